#!/bin/sh
# A model bundle out of somebody's model, in a virtual environment that this makes: models/convert/convert.sh OPTIONS (--help lists them)
#
#   VENV     default .deps/convert-venv beside the repository's other downloads (made if absent; Python 3.11 or newer)
#   PROGRAM  what is run in it, default convert.py
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${VENV:-$here/../../.deps/convert-venv}
wanted=$(cat "$here/requirements.txt" "$here/requirements-keras2.txt" | cksum)

if [ "$(cat "$venv/requirements.cksum" 2>/dev/null)" != "$wanted" ]; then
    echo "convert.sh: making $venv (with TensorFlow: 2 GB, some minutes)" >&2
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "convert.sh: python3 is missing or older than 3.11; install a newer one, or name a VENV made with it" >&2
        exit 1
    fi
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements-keras2.txt"
    echo "$wanted" >"$venv/requirements.cksum"
fi
exec "$venv/bin/python" "${PROGRAM:-$here/convert.py}" "$@"
