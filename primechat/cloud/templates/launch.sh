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

# What this run is, filled in by `primechat export`: its stage, the folder of the models that it makes,
# its tag, and its text, empty for a run that fetches its dialogues itself.
stage=__STAGE__
family=__FAMILY__
tag=__TAG__
corpus=__CORPUS__

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-__BASE__}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src"
config="${CONFIG:-config.json}"
place=(--standalone)
if [ -n "${HEAD:-}" ]; then
    place=(--nnodes="${NODES:-2}" --rdzv_backend=c10d --rdzv_id=primechat --rdzv_endpoint="$HEAD")
fi
launch=(python -m torch.distributed.run "${place[@]}" --nproc_per_node="${RANKS:-__RANKS__}")

verb="${1:-start}"
shift || true
case "$verb" in
install)
    python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > constraints.txt
    pip install -c constraints.txt -e src
    ;;
preflight)
    trial="preflight-$$"
    case "$stage" in
    pretrain)
        python -m primechat preflight --gpus "${GPUS:-__GPUS__}" --config "$config" "$@"
        ;;
    autochat)
        python run.py --config "$config" --tag "$trial" --n_conversations 4 --turns 3 --generations 0 "$@"
        rm -rf "${NANOCHAT_BASE_DIR:?}/autochat/$trial"*
        ;;
    *)
        "${launch[@]}" run.py --config "$config" --tag "$trial" --steps 4 --eval.last_tokens 20480 "$@"
        rm -rf "${NANOCHAT_BASE_DIR:?}/$family/$trial"
        ;;
    esac
    ;;
data)
    if [ -n "$corpus" ]; then
        python -m primechat download --shards "$corpus:__SHARDS__"
    else
        echo "The run fetches its dialogues itself."
    fi
    ;;
run)
    resume=() before=""
    for word in "$@"; do
        case "$before $word" in
        *" --tag="*) tag="${word#--tag=}" ;;
        "--tag "*) tag="$word" ;;
        esac
        before="$word"
    done
    if [ -e "$NANOCHAT_BASE_DIR/$family/$tag/config.json" ]; then resume=(--resume); fi
    "${launch[@]}" run.py --config "$config" ${resume[@]+"${resume[@]}"} "$@"
    ;;
start)
    words=""
    [ $# = 0 ] || printf -v words ' %q' "$@"
    # Ctrl-C reaches tee as well; without -i it would go, and a run that can print no more could not save
    # a tmux server of its own: one that ran before would give the run its own environment, not this one
    tmux -L primechat new-session -d -s primechat "bash launch.sh run$words 2>&1 | tee -i -a run.log"
    echo "Started. Look at it: tmux -L primechat attach, or tail -f run.log"
    ;;
*)
    echo "launch.sh knows install, preflight, data, run and start, not $verb" >&2
    exit 2
    ;;
esac
