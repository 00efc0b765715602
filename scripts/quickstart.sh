#!/usr/bin/env bash
# The whole path on real images, minutes on two CPU cores: bash scripts/quickstart.sh
# Set-up, data, learning rate, training, plots, export; what is done already is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }

say "1/6 set-up: .venv"
bash scripts/setup.sh requirements.txt
python=.venv/bin/python

say "2/6 data: handwritten digits"
"$python" scripts/prepare_data.py digits data/digits

say "3/6 learning rate"
if [ -f runs/quickstart/lr_finder.json ]; then
    echo "found before: runs/quickstart/lr_finder.json"
else
    "$python" lr_finder.py --recipe quickstart --steps 60
fi

say "4/6 training"
"$python" trainer.py --recipe quickstart --max-lr-from-finder

say "5/6 plots"
"$python" plot_metrics.py --names quickstart

say "6/6 TorchScript and ONNX"
"$python" generate_trace_model.py --name quickstart

cat <<'END'

Everything lies in runs/quickstart/:
  config.json           settings, versions, commit, hardware
  lr_finder.png         the LR range test (and .json)
  metrics.jsonl         one line an epoch; train.log and result.json beside it
  training_metrics.png  the curves
  checkpoints/          what a resumed run starts from
  best.pt, last.pt      weights under torchvision's names
  export/               model.pt (TorchScript), model.onnx, model.json, examples/

Next:
  source .venv/bin/activate
  python3 gradio_deploy/app.py          the app, on http://127.0.0.1:7860
  python3 predict.py PHOTO              what it sees in a file of yours

  python3 scripts/prepare_data.py imagenette data/imagenette
  python3 trainer.py --name imagenette --train-folder-name data/imagenette/train \
      --val-folder-name data/imagenette/val --train-px 96 --val-px 96 --val-resize-px 110 \
      --batch-size 64 --epochs 5 --max-lr 0.05 --price-per-hour 0

  python3 trainer.py --dry-run          ImageNet, in /mnt/data/imagenetdata/: time and price
  nohup python3 trainer.py > train.log 2>&1 &
END
