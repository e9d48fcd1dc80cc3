#!/usr/bin/env bash
# Streams one chat: prints the answer as it comes, then its reasoning and its conclusion apart.
# Needs bash, curl and jq. R1_URL names the server, if it is not the one that is forwarded here.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "Usage: $0 \"Your prompt\"" >&2
    exit 1
fi
url=${R1_URL:-http://localhost:30000}/v1/chat/completions
ruler=----------------------------------------
answer=$(mktemp)
status=$(mktemp)
trap 'rm -f "$answer" "$status"' EXIT

fail() {
    printf '\n%s\n' "$1" >&2
    exit 1
}

# jq makes the body, so that a prompt may hold quotes, backslashes and newlines.
body=$(jq -n --arg prompt "$1" '{model: "default", messages: [
    {role: "system", content: "You are a helpful AI assistant"}, {role: "user", content: $prompt}],
    temperature: 0.6, top_p: 0.95, max_tokens: 2048, stream: true}')

echo "Streaming response:"
echo $ruler
start=$SECONDS
# Of the stream only lines "data: {...}" matter. One jq reads them all: -j prints texts side by side,
# and it ends with 3 where the server sent an error. What is no stream at all is an error's JSON,
# which ends up in the same place.
curl -sSN -w '%{stderr}%{http_code}' "$url" -H "Content-Type: application/json" -d "$body" 2>"$status" |
    sed -u -n -e 's/^data: //' -e '/^{/p' |
    jq --unbuffered -j 'if .error or .object == "error"
        then "\n" + ((.error.message? // .message // .error) | tostring) + "\n" | halt_error(3)
        else .choices[0]?.delta.content // empty end' | tee "$answer"
jq_status=${PIPESTATUS[2]}
echo
echo $ruler
code=$(tail -c 3 "$status")
[ "$code" = 000 ] && fail "no answer from $url: $(head -c -3 "$status")"
[ "$code" != 200 ] && fail "$url answered with status $code"
[ "$jq_status" -ne 0 ] && fail "the stream ended with an error"
[ -s "$answer" ] || fail "the answer is empty"

# Between the tags is what the model thought, behind them what it says. $(...) drops a text's last
# newlines, so that nothing has to be trimmed at its end.
text=$(cat "$answer")
reasoning=""
final=$text
if [[ $text == *"</think>"* ]]; then
    reasoning=${text%%"</think>"*}
    reasoning=${reasoning#*"<think>"}
    final=${text#*"</think>"}
fi
trim() { sed -e '/./,$!d' <<<"$1"; }  # without the empty lines at its head
printf '\nParsed Results:\n%s\nReasoning:\n%s\n\nFinal Answer:\n%s\n\n' \
    $ruler "$(trim "$reasoning")" "$(trim "$final")"
echo "Execution time: $((SECONDS - start)) seconds"
