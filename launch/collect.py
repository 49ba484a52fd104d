"""Collects real text and pairs from installed Python packages, to try every stage without downloading a data set.

    nomic-jax collect --output=DIR

    DIR/pairs/code.jsonl     docstring -> function, from the packages in site-packages
    DIR/pairs/icd10.jsonl    inclusion term -> title of a diagnosis (ICD-10-CM), with its chapter as label
    DIR/labelled/...         more pairs of both sources, reserved for finetuning
    DIR/mlm/text.jsonl       docstrings, documentation and diagnoses as running text
    DIR/mlm.yaml pairs.yaml labelled.yaml   mixtures of these files
    DIR/held_out/<source>/   retrieval tasks; none of the files above contains their queries or documents
    DIR/summary.json         counts and settings; written last: if it exists, the other files are complete

The result depends on the settings and the installed packages, not on where the packages are installed.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import yaml
from absl import flags
from tqdm import tqdm

from nomic_jax.curate.hold_out import Split, sampling_key
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.extras import needs
from nomic_jax.files.folders import check_only
from nomic_jax.files.writing import atomic_file, write_json

from .errors import run

FLAGS = flags.FLAGS
OUTPUTS = {"held_out", "pairs", "labelled", "mlm", "pairs.yaml", "labelled.yaml", "mlm.yaml", "summary.json"}

# This project, and the installer with the packages that come with it.
EXCLUDED_PACKAGES = {"nomic_jax", "launch", "configs", "convert", "pip", "setuptools", "pkg_resources", "wheel"}
# Tests, and copies of other packages.
EXCLUDED_FOLDERS = {"test", "tests", "testing", "vendor", "_vendor", "vendored", "_vendored", "externals"}
SUFFIXES = (".py", ".md", ".rst")
PACKAGE_SHARE = 0.25  # largest share of the code pairs from one top-level package
QUERY_WORDS = range(4, 61)
DOCUMENT_CHARACTERS = range(60, 3001)
DOCSTRING_CHARACTERS = 100  # shorter docstrings are not used as running text
TEXT_CHARACTERS = 2000
MLM_BYTES = 6_000_000
POOL = 1000  # least number of documents in a held-out task

# Source -> the prefixes of queries and of documents.
PREFIXES = {"code": ("search_query", "search_document"), "icd10": ("classification", "classification")}
# Rows with the same value in this column stay on one side of the split, because they may be nearly identical.
GROUP = {"code": "path", "icd10": "document"}


class Diagnosis(NamedTuple):
    title: str
    terms: list[str]  # its inclusion terms: paraphrases of the title, or diagnoses it covers
    chapter: str


def collect(
    output: str | Path,
    *,
    code_pairs: int = 8000,
    held_out: int = 1000,
    seed: int = 0,
    pool: int = POOL,
    site_packages: str | Path | None = None,
) -> dict:
    """Writes the files listed above and returns the summary. Existing files of the same settings and packages are kept.

    Args:
      code_pairs: target number of training pairs from code; icd10 always contributes all its pairs.
      held_out: queries in each held-out task.
      pool: least number of documents in each held-out task.
      site_packages: directory of the installed packages; by default that of this interpreter.

    Raises:
      ValueError: ``output`` holds a result of other settings or packages, or a source has too few pairs for a task.
      MissingPackage: simple_icd_10_cm is not installed.
    """
    output = Path(output)
    check_only(output, OUTPUTS.__contains__, "launch.collect")
    site_packages = Path(site_packages or sysconfig.get_paths()["purelib"])
    files = installed_files(site_packages, seed)
    settings = {
        **{"code_pairs": code_pairs, "held_out": held_out, "seed": seed, "pool": pool},
        **{"packages": packages_sha256(site_packages, files), "icd10": icd10_version()},
    }
    if (output / "summary.json").exists():
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        if summary["settings"] != settings:
            raise ValueError(
                f"{output} was collected with other settings or other installed packages: {summary['settings']}, not "
                f"{settings}; use another folder"
            )
        return summary

    diagnoses = read_icd10(seed)
    code, docstrings, code_found = read_code(site_packages, files, code_pairs + max(held_out, pool))
    term_rows = [
        {"query": term, "document": title, "label": chapter}
        for title, terms, chapter in diagnoses
        for term in terms
        if term != title
    ]
    icd10 = list({(row["query"], row["document"]): row for row in term_rows}.values())

    counts = {}
    held_texts: set[str] = set()
    held_groups: set[str] = set()
    for name, rows, rows_found in (("code", code, code_found), ("icd10", icd10, len(term_rows))):
        split = Split(("query", "document"), GROUP[name], seed)
        held = split.hold_out(lambda rows=rows: rows, held_out, pool)  # type: ignore[misc]
        training = [row for row in rows if split.is_for_training(row, held)]
        if not training:
            raise ValueError(
                f"{name}: the {len(rows)} pairs found do not exceed what is held out ({held_out} queries, {pool} "
                "documents), so none is left for training; install more packages, or lower --held_out"
            )
        held_texts |= held.texts
        held_groups |= held.groups
        labelled = [row for row in training if split.is_labelled(row)]
        pairs = [row for row in training if not split.is_labelled(row)]
        queries, documents = split.write_task(output / "held_out" / name, held, held_out, *PREFIXES[name])
        write_rows(output / "pairs" / f"{name}.jsonl", pairs)
        write_rows(output / "labelled" / f"{name}.jsonl", labelled)
        counts[name] = {
            "rows_found": rows_found,
            "duplicates_dropped": rows_found - len(rows),
            "pairs": len(pairs),
            "labelled": len(labelled),
            "held_out_queries": queries,
            "held_out_documents": documents,
            "dropped_as_equal_to_held_out": len(rows) - len(held.rows) - len(training),
        }

    texts = [
        *(text for path, text in docstrings if path not in held_groups),
        *("\n".join([title, *terms]) for title, terms, _ in diagnoses if title not in held_groups),
        *read_documentation(site_packages, files),
    ]
    text_rows = [{"text": text} for text in running_text(texts, held_texts, seed)]
    write_rows(output / "mlm" / "text.jsonl", text_rows)
    text_bytes = sum(len(row["text"].encode()) for row in text_rows)
    write_mixtures(output)
    summary = {"settings": settings, "pairs": counts, "mlm": {"rows": len(text_rows), "bytes": text_bytes}}
    write_json(output / "summary.json", summary)
    return summary


def read_icd10(seed: int) -> list[Diagnosis]:
    """The ICD-10-CM diagnoses that have inclusion terms, in a pseudo-random order of their titles."""
    with needs("collecting diagnoses", "nomic_jax[quickstart]"):
        import simple_icd_10_cm as icd
    diagnoses = [
        Diagnosis(clean(icd.get_description(code)), [clean(term) for term in terms], icd.get_ancestors(code)[-1])
        for code in icd.get_all_codes(False)
        if (terms := icd.get_inclusion_term(code))
    ]
    return sorted(diagnoses, key=lambda diagnosis: sampling_key(seed, diagnosis.title))


def installed_files(site_packages: Path, seed: int) -> list[str]:
    """Relative paths of source and documentation files below ``site_packages``, in a pseudo-random order."""
    paths = (
        path.relative_to(site_packages)
        for path in site_packages.rglob("*")
        if path.suffix in SUFFIXES or path.name == "METADATA"
    )
    return sorted(
        (
            path.as_posix()
            for path in paths
            # "pip" and "pip-25.0.dist-info" belong to one package; "__editable__..." points out of site-packages.
            if path.parts[0].split("-")[0] not in EXCLUDED_PACKAGES
            and not path.parts[0].startswith("__editable__")
            and EXCLUDED_FOLDERS.isdisjoint(path.parts)
        ),
        key=lambda path: sampling_key(seed, path),
    )


def packages_sha256(site_packages: Path, files: list[str]) -> str:
    """A hash of the names and contents of the files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = b""
        with contextlib.suppress(OSError):  # such as a link to nothing, which no row comes from
            content = (site_packages / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def icd10_version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("simple-icd-10-cm")
    return ""  # reading it says what to install


def read_code(
    site_packages: Path, files: list[str], wanted: int
) -> tuple[list[dict[str, str]], list[tuple[str, str]], int]:
    """Reads source files in order until it has ``wanted`` pairs.

    Returns:
      The pairs {query, document, path} without repeated queries or documents; (path, docstring) of every function
      read; and the number of pairs found, duplicates included.
    """
    pairs, docstrings, found = [], [], 0
    seen: set[str] = set()
    per_package: Counter[str] = Counter()
    bar = tqdm(desc="reading functions", unit=" pairs", total=wanted)
    for path in files:
        package, name = path.split("/")[0], PurePosixPath(path).stem
        if not path.endswith(".py") or name.startswith("test_") or name.endswith("_test") or name == "conftest":
            continue
        if per_package[package] >= PACKAGE_SHARE * wanted:
            continue
        for docstring, document in read_functions(site_packages / path):
            if len(docstring) >= DOCSTRING_CHARACTERS:
                docstrings.append((path, docstring))
            query = one_line(paragraphs(docstring)[0])
            if len(query.split()) not in QUERY_WORDS or not query.isascii() or len(document) not in DOCUMENT_CHARACTERS:
                continue
            found += 1
            if query not in seen and document not in seen:
                seen |= {query, document}
                pairs.append({"query": query, "document": document, "path": path})
                per_package[package] += 1
                bar.update()
        if len(pairs) >= wanted:
            break
    bar.close()
    return pairs, docstrings, found


def read_functions(file: Path) -> Iterator[tuple[str, str]]:
    """(docstring, source without it) of every function and method with a docstring; nothing for unparsable files."""
    try:
        with warnings.catch_warnings(action="ignore"):  # other people's invalid escapes
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for function in _functions(tree.body):
        docstring = clean(ast.get_docstring(function) or "")
        if docstring:
            function.body = function.body[1:]
            try:
                # If the body is only a docstring, there is no document.
                yield docstring, clean(ast.unparse(function)) if function.body else ""
            except RecursionError:  # generated code with very deep nesting
                continue


def _functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
            yield from _functions(node.body)


def read_documentation(site_packages: Path, files: list[str]) -> Iterator[str]:
    """The descriptions of packages and their .md and .rst files, without licences."""
    for path in files:
        if path.endswith(".py") or "licen" in path.lower():
            continue
        text = clean((site_packages / path).read_text(encoding="utf-8", errors="ignore"))
        # METADATA consists of header fields, an empty line, and the description.
        yield text.partition("\n\n")[2] if path.endswith("METADATA") else text


def running_text(texts: Iterable[str], held_texts: set[str], seed: int) -> list[str]:
    """Distinct pieces of the texts in a pseudo-random order, up to MLM_BYTES.

    Pieces with a line or paragraph that equals a held-out text are left out.
    """
    held = {one_line(text) for text in held_texts}
    kept, size = [], 0
    for piece in sorted(
        {piece for text in texts for piece in pieces(text)}, key=lambda piece: sampling_key(seed, piece)
    ):
        if held.isdisjoint(map(one_line, [*paragraphs(piece), *piece.split("\n")])):
            kept.append(piece)
            size += len(piece.encode())
        if size >= MLM_BYTES:
            break
    return kept


def pieces(text: str) -> Iterator[str]:
    """Splits a text at empty lines into pieces of at most TEXT_CHARACTERS; longer paragraphs stay whole."""
    piece = ""
    for paragraph in paragraphs(text):
        if piece and len(piece) + len(paragraph) + 2 > TEXT_CHARACTERS:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece:
        yield piece


def write_mixtures(output: Path) -> None:
    text = [{"name": "text", "bucket": "mlm/text.jsonl", "objective": {"type": "self", "columns": ["text"]}}]
    mixtures = {"mlm": text}
    for folder in ("pairs", "labelled"):
        mixtures[folder] = [
            {
                "name": name,
                "bucket": f"{folder}/{name}.jsonl",
                "objective": {"type": "paired", "columns": ["query", "document"]},
                "query_prefix": query_prefix,
                "document_prefix": document_prefix,
            }
            for name, (query_prefix, document_prefix) in PREFIXES.items()
        ]
    for name, datasets in mixtures.items():
        with atomic_file(output / f"{name}.yaml") as part:
            part.write_text(yaml.safe_dump({"datasets": datasets}, sort_keys=False), encoding="utf-8")


def clean(text: str) -> str:
    """Removes control characters, and surrogate code points, which UTF-8 cannot encode."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "", text).strip()


def paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def one_line(text: str) -> str:
    return " ".join(text.split())


def main(argv: list[str]) -> None:
    del argv
    summary = collect(FLAGS.output, code_pairs=FLAGS.code_pairs, held_out=FLAGS.held_out, seed=FLAGS.seed)
    for name, counts in (summary["pairs"] | {"mlm": summary["mlm"]}).items():
        print(f"{name:6} " + " · ".join(f"{value} {key.replace('_', ' ')}" for key, value in counts.items()))


if __name__ == "__main__":
    # Defined here, not at import: two commands that are imported together may use the same flag name.
    flags.DEFINE_string("output", None, "Folder for the result.", required=True)
    flags.DEFINE_integer("code_pairs", 8000, "Approximate number of training pairs from code.", lower_bound=1)
    flags.DEFINE_integer("held_out", 1000, "Queries in each held-out task.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the sample and of the split.")
    run(main)
