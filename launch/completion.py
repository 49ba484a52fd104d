"""Prints the completion of nomic-jax for a shell: nomic-jax completion bash|zsh|fish

    bash:  echo 'eval "$(nomic-jax completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(nomic-jax completion zsh)"' >> ~/.zshrc          # after compinit
    fish:  nomic-jax completion fish > ~/.config/fish/completions/nomic-jax.fish

It completes commands, their flags, and the shipped configurations; elsewhere, the names of files.
"""

import ast
from pathlib import Path

from nomic_jax.arguments import Parser

from .__main__ import FOLDER, commands

# Each passes the line up to the cursor to `nomic-jax completion --line=...`, which prints whole words.
SCRIPTS = {
    # Bash ends a word at = and :, so what comes before them is not repeated.
    "bash": """\
_nomic_jax() {
  local line=${COMP_LINE:0:COMP_POINT} word head
  word=${line##* }
  head=${word%"${word##*[=:]}"}
  mapfile -t COMPREPLY < <(nomic-jax completion --line="$line" 2>/dev/null)
  COMPREPLY=("${COMPREPLY[@]#"$head"}")
  [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace
}
complete -o default -F _nomic_jax nomic-jax""",
    "zsh": """\
_nomic_jax() {
  local -a found
  found=(${(f)"$(nomic-jax completion --line="$LBUFFER" 2>/dev/null)"})
  if (( $#found )); then compadd -S '' -- $found; else _files; fi
}
compdef _nomic_jax nomic-jax""",
    "fish": """\
complete -c nomic-jax -n __fish_use_subcommand -f
complete -c nomic-jax -a '(nomic-jax completion --line=(commandline -cp) 2>/dev/null)'""",
}


def main() -> None:
    parser = Parser("nomic-jax completion", __doc__)
    parser.add_argument("shell", choices=SCRIPTS, nargs="?")
    parser.add_argument("--line", help="print the words that may come next on this line, for the scripts")
    args = parser.parse_args()
    if args.line is not None:
        print("\n".join(next_words(args.line)))
    elif args.shell is None:
        parser.error("the shell is missing: bash, zsh or fish")
    else:
        print(SCRIPTS[args.shell])


def next_words(line: str) -> list[str]:
    """The words that may stand where a line ends; [] for the names of files."""
    *before, word = line.split(" ")
    before = [each for each in before if each]
    known = commands()
    if len(before) <= 1:
        return [name for name in (*known, "--help", "--version") if name.startswith(word)]
    command = known.get(before[1].replace("_", "-"))
    if command is None:
        return []
    if before[-1] in ("--config", "-config"):
        return [name for name in configurations() if name.startswith(word)]
    if word.startswith("--config="):
        return [f"--config={name}" for name in configurations() if f"--config={name}".startswith(word)]
    return [flag for flag in flags_of(command.file) if flag.startswith(word)] if word.startswith("-") else []


def flags_of(file: Path) -> list[str]:
    """The flags that a module and those beside it that it imports define, without importing them."""
    module = ast.parse(file.read_bytes())
    found, parts = {"--help"}, set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            parts |= {name for name in (node.module, *(alias.name for alias in node.names)) if name}
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        function, name = ast.unparse(node.func), str(node.args[0].value)
        if function.startswith("flags.DEFINE_") or function == "config_files.define":
            takes_no_value = function == "flags.DEFINE_bool"
            found.add(f"--{name}" if takes_no_value else f"--{name}=")
        elif function.endswith(".add_argument") and name.startswith("--"):
            takes_no_value = any(each.arg == "action" and "store" in ast.unparse(each.value) for each in node.keywords)
            found.add(name if takes_no_value else f"{name}=")
    for part in parts & {"errors", "engine", "teacher"}:
        found |= set(flags_of(file.with_name(f"{part}.py")))
    return sorted(found)


def configurations() -> list[str]:
    """NAME and NAME:variant of the shipped configurations."""
    found = []
    for file in sorted((FOLDER.parent / "configs").glob("[!_]*.py")):
        found.append(file.stem)
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "VARIANTS":
                assert isinstance(node.value, ast.Dict)
                found += [f"{file.stem}:{ast.literal_eval(key)}" for key in node.value.keys if key is not None]
    return found


if __name__ == "__main__":
    main()
