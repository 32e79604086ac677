#!/usr/bin/env bash
# Print a cache key to GITHUB_OUTPUT: the content of BASE and TUNED and the version of loradiag. What is not on this
# machine may change behind its address, so its key is of this run alone.
set -euo pipefail
{
  loradiag --version
  for side in "$BASE" "$TUNED"; do
    if [ -e "$side" ]; then
      (cd "$(dirname "$side")" && find -L "$(basename "$side")" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum)
    else
      echo "$side ${GITHUB_RUN_ID:-} ${GITHUB_RUN_ATTEMPT:-}"
    fi
  done
} | sha256sum | sed 's/^/key=/; s/ .*//' >>"$GITHUB_OUTPUT"
