#!/usr/bin/env bash
# Measure BASE and TUNED (or take RESULTS), judge them by POLICY, write everything into FOLDER, and exit as the gate does.
# BASE, TUNED, POLICY, RESULTS, FOLDER come from the environment; on GitHub also GITHUB_OUTPUT and GITHUB_STEP_SUMMARY.
set -euo pipefail
folder=${FOLDER:-loradiag}
mkdir -p "$folder"
results=${RESULTS:-}
if [ -z "$results" ]; then
  results=$folder/results.jsonl
  loradiag spectrum "$BASE" "$TUNED" --quiet --resume -o "$results"
fi

words=(gate)
if [ -e "$POLICY" ]; then words+=("$POLICY"); else words+=(--policy "$POLICY"); fi
words+=("$results")
if [ -n "${TUNED:-}" ]; then words+=(--for "$TUNED"); fi
if [ -n "${GITHUB_ACTIONS:-}" ]; then words+=(--github); fi
code=0
loradiag "${words[@]}" --overwrite --junit "$folder/gate.xml" --sarif "$folder/gate.sarif" -o "$folder/verdicts.jsonl" || code=$?
case $code in
  0) verdict=passed ;;
  1) verdict=failed ;;
  5) verdict=inconclusive ;;
  *) verdict=error ;;
esac

report=""
if [ "$verdict" != error ]; then
  loradiag report "$results" "$folder/verdicts.jsonl" --quiet --overwrite -o "$folder/report.html"
  loradiag report "$results" --quiet --overwrite -o "$folder/report.md"
  report=$folder/report.html
  # GitHub drops a summary of more than 1 MiB
  if [ -n "${GITHUB_STEP_SUMMARY:-}" ] && [ "$(wc -c <"$folder/report.md")" -lt 900000 ]; then
    cat "$folder/report.md" >>"$GITHUB_STEP_SUMMARY"
  fi
fi
if [ -n "${GITHUB_OUTPUT:-}" ]; then
  printf 'verdict=%s\nresults=%s\nreport=%s\n' "$verdict" "$results" "$report" >>"$GITHUB_OUTPUT"
fi
exit "$code"
