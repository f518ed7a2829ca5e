"""The texts of an exported folder: its launcher, its SkyPilot task, its README; @WORDS@ are filled in.

Hides: what differs between kinds of run. Reference: SkyPilot's task YAML; torch.distributed.run.
"""

from __future__ import annotations

IMAGE = "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404"
POD_BASE = "/workspace/cache/nanochat"
LAUNCH = """\
#!/usr/bin/env bash
# On the machine with the GPUs:
#   bash launch.sh install     once; keeps the torch that is there
#   bash launch.sh preflight   a minute; refuses before money is spent
#   bash launch.sh start       in tmux, so that it outlives the connection
#   tmux -L primechat attach   look at it; Ctrl-B D leaves it alone, Ctrl-C saves and stops
# `start` again goes on where a stopped run was saved. Words after `start` or `run` are flags of run.py.
# Several machines: NODES=2 HEAD=10.0.0.1:29500 bash launch.sh run, on each; their disk is shared.
set -euo pipefail
cd "$(dirname "$0")"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-@BASE@}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src"
config="${CONFIG:-config.json}"
place=(--standalone)
if [ -n "${HEAD:-}" ]; then
    place=(--nnodes="${NODES:-2}" --rdzv_backend=c10d --rdzv_id=primechat --rdzv_endpoint="$HEAD")
fi
verb="${1:-start}"
shift || true
case "$verb" in
install)
    python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > constraints.txt
    pip install -c constraints.txt -e src
    ;;
preflight) @PREFLIGHT@ ;;
data) @DATA@ ;;
run)
    resume=() tag="@TAG@" before=""
    for word in "$@"; do
        case "$before $word" in
        *" --tag="*) tag="${word#--tag=}" ;;
        "--tag "*) tag="$word" ;;
        esac
        before="$word"
    done
    if [ -e "$NANOCHAT_BASE_DIR/@FAMILY@/$tag/config.json" ]; then resume=(--resume); fi
    python -m torch.distributed.run "${place[@]}" --nproc_per_node="${RANKS:-@RANKS@}" \\
        run.py --config "$config" ${resume[@]+"${resume[@]}"} "$@"
    ;;
start)
    words=""
    [ $# = 0 ] || printf -v words ' %q' "$@"
    # Ctrl-C reaches tee as well; without -i it would go, and a run that can print no more could not save
    # a tmux server of its own: one that ran before would give the run its own environment, not this one
    tmux -L primechat new-session -d -s primechat "bash launch.sh run$words 2>&1 | tee -i -a run.log"
    echo "Started. Look at it: tmux -L primechat attach, or tail -f run.log"
    ;;
*) echo "launch.sh knows install, preflight, data, run and start, not $verb" >&2; exit 2 ;;
esac
"""
# verbs of the launcher: of a pretraining run, and of a stage that goes on from a model
PREFLIGHT = 'python -m primechat preflight --gpus "${GPUS:-@GPUS@}" --config "$config" "$@"'
DATA = "python -m primechat download --shards @CORPUS@:@SHARDS@"
TRY = """\
python -m torch.distributed.run "${place[@]}" --nproc_per_node="${RANKS:-@RANKS@}" \\
        run.py --config "$config" --tag "preflight-$$" --steps 4 \\
        --eval.last_tokens 20480 "$@" && rm -rf "$NANOCHAT_BASE_DIR/@FAMILY@/preflight-$$\""""
TRY_AUTOCHAT = """\
python run.py --config "$config" --tag "preflight-$$" --n_conversations 4 --turns 3 --generations 0 "$@" \\
        && rm -rf "$NANOCHAT_BASE_DIR/autochat/preflight-$$"*"""
STAGE_PLAN = """\
    @CONFIG@

It goes on from `@MODELS@`. On a machine that did not train it, bring that model from here first, once it
lies in @HOME@:

    ssh root@POD mkdir -p @BASE@/@FOLDER@
    rsync -a --exclude='optim_*' @HOME@/@FOLDER@/ root@POD:@BASE@/@FOLDER@/

`bash launch.sh preflight` tries it in a minute, and tells the tokens a second."""
RECIPE = """\


This is not the small run that the lab has set up for your own machine. It is the recipe `@NAMED@` at depth
@DEPTH@: a vocabulary of @VOCAB@ instead of 2,048, rows of @ROWS@ tokens, the text of @CORPUS@, and all rates,
schedules and first weights of nanochat at that time. `october2025` is its speedrun of that month,
whose cost has been measured; `nanochat2026` is its code of July 2026, which reads 12 tokens for each
parameter of the blocks and the head.

The other one: `primechat export 05 --depth @DEPTH@ --recipe @OTHER@ -o FOLDER`."""
READ_ME = """\
# @JOB@: from @LAB@ to @GPUS@

@PLAN@@RECIPE@

`run.py` is the lab without its display cells, `config.json` its frozen settings, `src/` the library that
wrote it. Expected: @COST@.

## Over ssh

On a pod of the image `@IMAGE@`:

```sh
rsync -a ./ root@POD:/workspace/@JOB@/          # from here; add -e "ssh -p PORT" as the pod says
ssh root@POD                                  # then, on the pod:
export NANOCHAT_BASE_DIR=@BASE@
cd /workspace/@JOB@
bash launch.sh install                        # keeps the image's torch
bash launch.sh preflight
bash launch.sh start
tmux -L primechat attach
```

`bash launch.sh start --max_dollars @LIMIT@ --dollars_per_hour @PRICE@` saves and stops before more is
spent. When it is done, bring it home from here, then delete the pod:

```sh
@PULL@
```

## With SkyPilot

In this folder:

```sh
sky launch -c primechat-@NAME@ sky.yaml --secret HF_TOKEN
# when it is done, bring it home; then delete the machine
@PULL_SKY@
sky down primechat-@NAME@
```

RunPod cannot stop a pod, only delete it with everything on it. So nothing here ends it by itself: **it costs
$@PRICE@ an hour until `sky down`, also when the run is done or has failed.**@BRING@
"""
BRING = """\n
SkyPilot rents a new machine, which has no model: `sky.yaml` sends it `@MODELS@` from
@HOME@, where that must lie first."""
SKY = """\
# sky launch -c primechat-@NAME@ sky.yaml --secret HF_TOKEN: @COST@
name: primechat-@NAME@
resources:
  infra: runpod
  accelerators: @ACCELERATOR@
  image_id: docker:@IMAGE@
  disk_size: @DISK@
  # no autostop: RunPod cannot stop a pod, only delete it with the model on it. Pull that, then `sky down`.
workdir: .
envs:
  NANOCHAT_BASE_DIR: @BASE@
secrets:
  HF_TOKEN: null
@MOUNTS@setup: |
  bash launch.sh install
run: |
  bash launch.sh preflight && bash launch.sh run
"""


def fill_words(text: str, words: dict[str, str]) -> str:
    """Return a text with its placeholders filled, also those in what is filled in."""
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text
