#!/bin/bash
# Checkpoints a process so that it is never lost: it is only stopped until the image is known to be
# whole.
#
#     checkpoint-safely.sh <pid> <images-dir> <shards> '<shard command with {}>'
#     checkpoint-safely.sh 1234 images 4 'lz4 | aws s3 cp - s3://checkpoints/app/{}.lz4'
#
# The process, which CRIU takes with all its descendants, is ended when everything has succeeded:
# CRIU, the streamer, and every part of every shard command. If anything failed, or this script is
# interrupted, it goes on as if nothing had happened.
#
# CRIU's log is <images-dir>/dump.log. CRIU_OPTIONS is passed on to `criu dump`, such as
# '--tcp-established'.

set -euo pipefail

if [ $# != 4 ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
pid=$1 images=$2 shards=$3 command=$4

fail() {
    printf 'checkpoint-safely: %s\n' "$*" >&2
    exit 1
}

# A process with its descendants, whatever process groups they are in.
tree() {
    local child
    echo "$1"
    for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
        tree "$child"
    done
}

resume() {
    local process
    # What was started while CRIU was at work belongs to it too.
    for process in $processes $(tree "$pid"); do
        kill -CONT "$process" 2>/dev/null || true
    done
}

streamer=
processes=
finish() {
    local status=$?
    trap '' INT TERM HUP
    if [ $status != 0 ]; then
        [ -z "$streamer" ] || kill "$streamer" 2>/dev/null || true
        [ -z "$streamer" ] || wait "$streamer" 2>/dev/null || true
        resume
    fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

kill -0 "$pid" || fail "there is no process $pid that we may signal"
processes=$(tree "$pid")
# In the background, so that the traps run at once.
# shellcheck disable=SC2086 # CRIU_OPTIONS is a list of words
criu-image-streamer --images-dir "$images" --num-shards "$shards" --shard-cmd "$command" capture -- \
    criu dump --stream --images-dir "$images" --log-file dump.log --tree "$pid" --leave-stopped \
    ${CRIU_OPTIONS:-} &
streamer=$!
wait "$streamer" || fail "the checkpoint failed (see also $images/dump.log): process $pid goes on"
streamer=
processes=$(tree "$pid")

# Only now is the image safe. No process runs between these signals: all are stopped.
for process in $processes; do
    kill -KILL "$process"
done
