"""Prompts: the texts that a model was trained to see before an input, and the one rule by which they are chosen.

A mixture gives each source a prefix for queries and one for documents. A model holds prompts: name -> text. The prompts
of a trained model come from its sources, with the exact texts.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

# nomic-embed's prefixes (paper section 3.3.1), which name the task of a text.
NOMIC_PREFIXES = ("search_query", "search_document", "classification", "clustering")
NOMIC_PROMPTS = {
    **{prefix: f"{prefix}: " for prefix in NOMIC_PREFIXES},
    # encode_query and encode_document of sentence-transformers look for "query" and "document".
    "query": "search_query: ",
    "document": "search_document: ",
}
# Role -> the names under which models hold its prompt; the first that is there counts: sentence-transformers' name, or
# nomic's. (A "passage" is no role: sentence-transformers gives every model an empty "document", which comes before it.)
ROLES = {
    "query": ("query", "search_query"),
    "document": ("document", "search_document"),
    "classification": ("classification",),
    "clustering": ("clustering",),
}
_ENDS = (" ", ":", "\n")


def read_prefix(given: str) -> str:
    """Returns a prefix as ``Source`` holds it: "query: " and "query" are the same; one that ends in " ", ":" or a line
    break otherwise is kept to the letter."""
    if given.endswith(": ") and given[:-2] and not given[:-2].endswith(_ENDS):
        return given[:-2]
    return given if given.endswith(_ENDS) and given.strip() else given.strip()


def prompt_text(prefix: str) -> str:
    """Returns the text that goes before an input: the prefix and ": ", or a prefix that ends in " ", ":" or a line
    break as it is written; "" for no prefix."""
    return f"{prefix}: " if prefix and not prefix.endswith(_ENDS) else prefix


def likely_prefix(prefix: str) -> str | None:
    """Returns nomic's prefix that was probably meant by one that differs from it by a few letters; None for others."""
    if prefix in NOMIC_PREFIXES:
        return None
    word = prefix.rstrip(": \n").replace(" ", "_").replace("-", "_").lower()
    return next(iter(difflib.get_close_matches(word, NOMIC_PREFIXES, n=1, cutoff=0.85)), None)


def find_prompt(prompts: Mapping[str, str], name: str) -> str | None:
    """Returns the text under a name or, for the name of a role, under another name of that role; None if none is there.

    This is the rule for every caller: the role's prompt if the model has one, else none.
    """
    if name in prompts:
        return prompts[name]
    same = next((names for role, names in ROLES.items() if name in (role, *names)), ())
    return next((prompts[other] for other in same if other in prompts), None)


def prompt_for(prompts: Mapping[str, str], name: str) -> str:
    """Returns the text for a role, or for a prompt by its name; "" if the model has no prompt for the role.

    Raises:
      ValueError: the name is neither that of a role nor that of one of the model's prompts.
    """
    found = find_prompt(prompts, name) if name else ""
    if found is None and not any(name in (role, *names) for role, names in ROLES.items()):
        known = ", ".join(map(repr, prompts)) or "none"
        raise ValueError(f"the model has no prompt {name!r}; its prompts are: {known}")
    return found or ""


def prompt_name(prefix: str, role: str) -> str:
    """Returns the name that finds the prompt of a source's prefix in models: nomic's own, or that of the role."""
    return prefix if prefix in NOMIC_PREFIXES else role


def prompts_of(sources: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the prompts of a model that was trained on sources of pairs; {} if none has a prefix.

    "query" and "document" hold the text of all sources; if sources differ, search_query's and search_document's, or
    else that of the most rows. nomic's texts are also under nomic's names. If sources differ, the other texts are under
    SOURCE_query and SOURCE_document.

    Args:
      sources: name, query_prefix, document_prefix and rows of each source, as the record of a run holds them.
    """
    listed = list(sources)
    texts = {role: [prompt_text(source[f"{role}_prefix"]) for source in listed] for role in ("query", "document")}
    used = [text for found in texts.values() for text in found]
    if not any(used):
        return {}
    prompts = {prefix: f"{prefix}: " for prefix in NOMIC_PREFIXES if f"{prefix}: " in used}
    for role, found in texts.items():
        rows: dict[str, int] = {}
        for text, source in zip(found, listed):
            rows[text] = rows.get(text, 0) + source.get("rows", 0)
        search = NOMIC_PROMPTS[role]
        prompts[role] = search if search in rows else max(rows, key=lambda text: rows[text])
    for role, found in texts.items():
        for text, source in zip(found, listed):
            if len(set(found)) > 1 and text not in prompts.values():
                name = f"{source['name']}_{role}"
                while name in prompts:
                    name += "_"
                prompts[name] = text
    return prompts
