#!/usr/bin/env bash
# The whole path on this computer, with the commands that a user types: scripts/demo.sh [--steps N]
#
# Real proteins -> corpus -> ProtBert on two ranks -> preempted half way -> resumed -> embeddings -> loss curve.
# Everything goes to the folder demo/ (DEMO=PATH puts it elsewhere), which is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$(realpath -m "${VENV:-.venv}")
demo=${DEMO:-demo}
steps=200
if [[ ${1:-} == --steps ]]; then steps=$2; fi
half=$((steps / 2))
run=$demo/run
requeue=75

unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PATH=$venv/bin:$PATH PYTHONNOUSERSITE=1

title() { printf '\n== %s\n' "$*"; }
show() {
  printf '$ %s\n' "$*"
  "$@"
}
steps_done() { if [[ -f $run/metrics.jsonl ]]; then wc -l <"$run/metrics.jsonl"; else echo 0; fi; }

SECONDS=0
if [[ -e $demo && ! -e $demo/.prottrans-demo ]] && [[ -n $(ls -A "$demo") ]]; then
  echo "$demo exists and was not made by this demo; choose another folder: DEMO=PATH make demo" >&2
  exit 73
fi
rm -rf "$demo"
mkdir -p "$demo"
touch "$demo/.prottrans-demo"

title "1/5 Preprocess 10,000 real proteins, with a validation split"
show prottrans preprocess data/swissprot201401_sp50_sample10k.fasta.zst --out "$demo/corpus" --workers 2 --validation 0.02

title "2/5 Pre-train a tiny ProtBert on two ranks, and preempt it after step $half of $steps, as a cluster would"
pretrain=(prottrans pretrain tiny_prot_bert --corpus "$demo/corpus" --machine laptop --nodes 2 --run-dir "$run" --steps "$steps")
printf '$ %s\n' "${pretrain[*]}"
"${pretrain[@]}" &
job=$!
trap 'kill -TERM "$job" 2>/dev/null || true' EXIT # an interrupted demo leaves nothing behind
while kill -0 "$job" 2>/dev/null && (($(steps_done) < half)); do sleep 0.2; done
printf '$ kill -TERM %s\n' "$job"
kill -TERM "$job" 2>/dev/null || true
code=0
wait "$job" || code=$?
trap - EXIT
echo "the job ended with exit code $code after step $(steps_done)"
if ((code != requeue)); then
  echo "expected $requeue: stopped with the state saved, please requeue" >&2
  exit 70
fi

title "3/5 Resume: the same command"
show "${pretrain[@]}"
if (($(steps_done) != steps)); then
  echo "metrics.jsonl has $(steps_done) steps, not $steps" >&2
  exit 70
fi

title "4/5 Embed 500 other proteins with the trained model"
show prottrans embed "$run" data/mmseqs2_example_QUERY.fasta.gz --out "$demo/embeddings.h5"

title "5/5 What came of it, in $SECONDS s"
python -m prottrans_hpc.train.curve "$run" --out "$demo/loss.png"
cat <<END
run directory    $run
  what was run   $run/run.json, $run/environment.json, $run/job.sh
  each step      $run/metrics.jsonl  (tensorboard --logdir $run/tensorboard)
  logs           $(echo "$run"/logs/*)
  checkpoints    $(echo "$run"/checkpoints/*)
corpus           $demo/corpus
embeddings       $demo/embeddings.h5
END
