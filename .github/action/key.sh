#!/usr/bin/env bash
# Write to GITHUB_OUTPUT a cache key and a new empty folder for what the cache holds, outside the checkout. The key is the
# content of BASE, TUNED and MERGED and the version of loradiag. What is not on this machine may change behind its
# address, so its key is of this run alone.
set -euo pipefail
export LORADIAG_PLUGINS=0 LORADIAG_PROJECT=0
unset CDPATH
key=$({
  loradiag --version
  for side in "$BASE" "$TUNED" "${MERGED:-}"; do
    if [ -e "$side" ]; then
      (cd -- "$(dirname -- "$side")" && find -L "./$(basename -- "$side")" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum --)
    else
      printf '%s %s %s\n' "$side" "${GITHUB_RUN_ID:-}" "${GITHUB_RUN_ATTEMPT:-}"
    fi
  done
} | sha256sum | cut -d ' ' -f 1)
# Not of a random name: the cache restores files only to the path that they had.
cache=${RUNNER_TEMP:?}/loradiag-$key
rm -rf -- "$cache"
mkdir -p -- "$cache"
printf 'key=%s\ncache=%s\n' "$key" "$cache" >>"$GITHUB_OUTPUT"
