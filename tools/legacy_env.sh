#!/usr/bin/env bash
# Builds the tutorial's own stack (transformers 4.57, peft 0.18, bitsandbytes) in an environment beside ours.
# Usage: [PYTHON=python3] tools/legacy_env.sh [FOLDER]; FOLDER is .venv-legacy unless given.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-legacy}

rm -f "$folder/.ready"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip --disable-pip-version-check install --quiet --requirement constraints-legacy.txt
# `.ready` is what make looks at: it must not exist before the stack imports in the versions it is here for.
"$folder/bin/python" - <<'PYTHON'
import bitsandbytes, peft, torch, transformers

assert transformers.__version__.startswith("4.57."), transformers.__version__
assert peft.__version__.startswith("0.18."), peft.__version__
print(f"transformers {transformers.__version__}, peft {peft.__version__}, "
      f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
PYTHON
touch "$folder/.ready"
