# A virtual environment of the project's own, for the scripts beside this file:  source scripts/environment.sh
#
#   find_python                       sets PYTHON to a Python >= 3.11 that can make virtual environments
#   make_environment FOLDER WHAT...   makes or reuses FOLDER, with WHAT installed ("-e .[test]"); sets PY to its Python
#
# Set PYTHON to choose the interpreter. An environment is made again when pyproject.toml, the interpreter
# or the folder of the project changes.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        # Asked, not believed: a name on the PATH may be a stub that only says what to install.
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            PYTHON=$candidate
            return
        fi
    done
    echo "No Python >= 3.11 with its venv module found (tried: ${PYTHON:-python3, python3.11 to python3.14, python})." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    exit 2
}

make_environment() {
    local folder=$1 stamp
    shift
    find_python
    PY=$folder/bin/python
    stamp=$("$PYTHON" -c '
import hashlib, os, sys
text = open("pyproject.toml", "rb").read() + repr((sys.version, sys.argv[1:], os.getcwd())).encode()
print(hashlib.sha256(text).hexdigest())' "$@")
    if [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ] && "$PY" -c '' 2>/dev/null; then
        return
    fi
    if [ -e "$folder" ] && [ ! -e "$folder/stamp" ]; then
        echo "$folder is there and was not made by this script; move it away first." >&2
        exit 2
    fi
    echo "Setting up $folder with $("$PYTHON" --version), the first time only ..."
    rm -rf "$folder"
    # Marks it as ours, and as unfinished.
    mkdir "$folder" && touch "$folder/stamp"
    # Debian's Python may have venv without ensurepip; then the pip outside installs into it.
    "$PYTHON" -m venv "$folder" >/dev/null 2>&1 || "$PYTHON" -m venv --without-pip "$folder"
    find_pip
    "${PIP[@]}" install --quiet --disable-pip-version-check "$@"
    echo "$stamp" >"$folder/stamp"
}

find_pip() {
    if "$PY" -m pip --version >/dev/null 2>&1; then
        PIP=("$PY" -m pip)
    else
        PIP=("$PYTHON" -m pip --python "$PY")
    fi
}
