#!/usr/bin/env bash
# Lint CONFIG if it is given. Measure BASE and TUNED, or verify MERGED = BASE + TUNED, or take RESULTS; judge by POLICY,
# write everything into FOLDER, and exit as the gate does. All come from the environment; on GitHub also GITHUB_OUTPUT and GITHUB_STEP_SUMMARY, and
# CACHE, an empty folder outside the checkout or one with the results that were restored for these inputs.
set -euo pipefail
export LORADIAG_PLUGINS=0 LORADIAG_PROJECT=0
verdict=error results="" report="" folder=""

# Refuse a path with a link in the checkout: a committed one may lead anywhere.
refuse_links() {
  local part=$1
  while [ "$part" != . ] && [ "$part" != / ]; do
    while [ "$part" != / ] && [ "${part%/}" != "$part" ]; do part=${part%/}; done
    case $part in
      "$PWD"/* | "$(pwd -P)"/* | [!/]*)
        if [ -L "$part" ]; then
          echo "$1: $part is a symbolic link; give a folder without links, or remove it" >&2
          exit 2
        fi
        ;;
    esac
    part=$(dirname -- "$part")
  done
}

trap '[ -z "${GITHUB_OUTPUT:-}" ] || printf "%s\n" "verdict=$verdict" "results=$results" "report=$report" "folder=$folder" >>"$GITHUB_OUTPUT"' EXIT
for input in BASE TUNED MERGED POLICY RESULTS CONFIG FOLDER; do
  case ${!input:-} in
    *[[:cntrl:]]*)
      echo "$input: contains a control character; give one path" >&2
      exit 2
      ;;
  esac
done
merged=${MERGED:-} results=${RESULTS:-}
refuse_links "${FOLDER:-loradiag}"
folder=${FOLDER:-loradiag}
ships=${merged:-${TUNED:-}}
if [ -n "${CONFIG:-}" ]; then
  mkdir -p -- "$folder"
  words=(--overwrite --junit="$folder/lint.xml" --output="$folder/lint.jsonl")
  if [ -n "${GITHUB_ACTIONS:-}" ]; then words+=(--github); fi
  loradiag lint "${words[@]}" -- ${BASE:+"$BASE"} "$CONFIG" || {
    code=$?
    if [ "$code" = 1 ]; then verdict=failed; fi
    exit "$code"
  }
  if [ -z "$ships" ]; then
    verdict=passed results=$folder/lint.jsonl
    exit 0
  fi
fi
if [ -z "$ships" ]; then
  echo "tuned: missing; name the checkpoint or adapter that ships, or nothing checks that the results are of it" >&2
  exit 2
fi
policy=${POLICY:-$([ -n "$merged" ] && echo merge || echo adapter-basic)}

mkdir -p -- "$folder"
if [ -z "$results" ]; then
  # Not in the checkout: a results file that was committed there would be taken for a finished measurement.
  measured=${CACHE:-$(mktemp -d)}/results.jsonl
  if [ -e "$measured" ]; then
    echo "Results restored from the cache: $measured, $(wc -l <"$measured") lines, sha256 $(sha256sum <"$measured" | cut -d ' ' -f 1)"
  fi
  if [ -n "$merged" ]; then
    # A wrong merge (1) and an inconclusive one (5) are for the gate to judge.
    loradiag verify-merge --quiet --resume -o "$measured" -- "$BASE" "$TUNED" "$merged" || {
      code=$?
      [ "$code" = 1 ] || [ "$code" = 5 ] || exit "$code"
    }
  else
    loradiag spectrum --quiet --resume -o "$measured" -- "$BASE" "$TUNED"
  fi
  rm -f -- "$folder/results.jsonl"
  cp -- "$measured" "$folder/results.jsonl"
  results=$folder/results.jsonl
fi

words=(--overwrite --junit="$folder/gate.xml" --output="$folder/verdicts.jsonl" --for="$ships")
if [ -n "${GITHUB_ACTIONS:-}" ]; then words+=(--github); fi
code=0
loradiag gate "${words[@]}" --policy="$policy" -- "$results" || code=$?
case $code in
  0) judged=passed ;;
  1) judged=failed ;;
  5) judged=inconclusive ;;
  *) exit "$code" ;;
esac

loradiag report --quiet --overwrite --output="$folder/report.html" -- "$results" "$folder/verdicts.jsonl"
loradiag report --quiet --overwrite --output="$folder/report.md" -- "$results"
report=$folder/report.html
# GitHub drops a summary of more than 1 MiB
if [ -n "${GITHUB_STEP_SUMMARY:-}" ] && [ "$(wc -c <"$folder/report.md")" -lt 900000 ]; then
  cat -- "$folder/report.md" >>"$GITHUB_STEP_SUMMARY"
fi
verdict=$judged
exit "$code"
