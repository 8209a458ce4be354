#!/bin/sh
# Clients that people have, against a running server; each draws a picture and says so, or what went wrong.
#
#   examples/clients/run.sh [http://127.0.0.1:8000]
#
# Python's and Node's libraries are installed into a folder of their own, which is kept: $CLIENTS_DIR (default
# /tmp/tetriserve-clients). What is not there (Node, Java, curl, wget) is left out.
url=${1:-http://127.0.0.1:8000}
here=$(cd "$(dirname "$0")" && pwd)
dir=${CLIENTS_DIR:-/tmp/tetriserve-clients}
body='{"prompt": "a small red circle", "size": "256x256", "num_inference_steps": 4, "slo_ms": 20000}'
json='Content-Type: application/json'
failed=0
mkdir -p "$dir"

try() {
    name=$1
    shift
    if said=$("$@" 2>&1); then
        echo "ok      $name: $(echo "$said" | tail -1 | cut -c1-100)"
    else
        failed=1
        echo "FAILED  $name: $(echo "$said" | tail -1 | cut -c1-300)"
    fi
}

has() { command -v "$1" > /dev/null || { echo "absent  $1"; return 1; }; }

if has curl; then
    try "curl" curl -sf "$url/v1/images/generations" -H "$json" -d "$body" -o /dev/null -w '%{http_code} %{content_type}'
    try "curl --http2" curl -sf --http2 "$url/v1/images/generations" -H "$json" -d "$body" -o /dev/null -w '%{http_code}'
    try "curl -I" curl -sfI "$url/health"
    try "curl, stream" sh -c "curl -sfN '$url/v1/images/generations' -H '$json' \
        -d '${body%\}}, \"stream\": true, \"partial_images\": 2}' | grep -c ^event:"
fi
if has curl && has python3; then
    try "curl, edit" sh -c "curl -sf '$url/v1/images/generations' -H '$json' -d '$body' \
        | python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)[\"data\"][0][\"b64_json\"]))' \
        | curl -sf '$url/v1/images/edits' -F image=@- -F prompt='a large yellow square' -F num_inference_steps=4 -o /dev/null -w '%{http_code}'"
fi
if has wget; then
    try "wget" wget -q -O /dev/null --header "$json" --post-data "$body" "$url/v1/images/generations"
    try "wget --spider" wget -q --spider "$url/v1/models"
fi
if has java; then
    try "java.net.http" java "$here/Client.java" "$url"
fi
if has node && has npm; then
    [ -d "$dir/node_modules/openai" ] \
        || (cd "$dir" && npm init -y > /dev/null && npm install --silent openai ai @ai-sdk/openai > /dev/null)
    cp "$here"/*.mjs "$dir"
    try "openai (Node)" node "$dir/openai.mjs" "$url"
    try "Vercel AI SDK" node "$dir/vercel.mjs" "$url"
fi
if has python3; then
    [ -x "$dir/venv/bin/python" ] \
        || (python3 -m venv "$dir/venv" && "$dir/venv/bin/pip" install -q openai litellm langchain-openai > /dev/null)
    for name in openai litellm langchain; do
        try "$name (Python)" "$dir/venv/bin/python" "$here/clients.py" "$name" "$url"
    done
fi
exit $failed
