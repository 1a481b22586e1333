#!/usr/bin/env bash
# Sets up everything, then serves a small real model with an int4 KV cache and shows that it works.
#
#   scripts/serve.sh                    SmolLM2-135M-Instruct on http://127.0.0.1:30000
#   scripts/serve.sh --smoke            the same, then stop; exit code 0 if answer, format and capacity are right
#   scripts/serve.sh --model PATH ...   any checkpoint; further flags go to SGLang
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(scripts/setup.sh)
case " $* " in
  *" --model "* | *" --model="*) model=() ;;
  *) model=(--model "$("$python" scripts/prepare_model.py)") ;;
esac
exec "$python" -m saw_int4.serve --log .cache/serve.log "${model[@]}" "$@"
