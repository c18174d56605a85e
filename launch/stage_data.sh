#!/usr/bin/env bash
# Copies models and prompt files from a shared file system to this node's own disk, once per node.
#
#   bash launch/stage_data.sh --to /local/opdlm /shared/Qwen3-8B /shared/prompts.parquet
#   bash launch/stage_data.sh --dry-run --to /local/opdlm /shared/Qwen3-8B                    # only prints
#   bash launch/stage_data.sh --verify hashes --to /local/opdlm /shared/Qwen3-8B              # reads both sides again
#
# A copy gets its name, DIR/NAME, when it is whole and checked: a job that is killed meanwhile leaves nothing that looks
# like a model. A copy that is there already stays if the source's names, sizes and times are those it was copied from,
# and is replaced otherwise; what is there and is none is left alone, with an error.
# Several callers on a node wait for each other. Links are followed (folders of a hub's cache consist of them).
set -euo pipefail
refuse() { echo "error: $*" >&2; exit 2; }

dry_run=no verify=sizes target=""
while (($#)); do
    case "$1" in
        --dry-run) dry_run=yes; shift ;;
        --to | --verify)
            (($# > 1)) || refuse "$1 needs a value"
            if [[ "$1" == --to ]]; then target="$2"; else verify="$2"; fi
            shift 2 ;;
        -*) refuse "$1 is no setting of stage_data.sh" ;;
        *) break ;;
    esac
done
[[ -n "$target" ]] || refuse "--to must name a folder on this node's disk"
[[ "$verify" == sizes || "$verify" == hashes ]] || refuse "--verify ($verify) must be sizes or hashes"
(($#)) || refuse "nothing to copy"

names=()
for source in "$@"; do # all of them before the first copy is made
    [[ -e "$source" ]] || refuse "$source does not exist"
    name="$(basename "$source")"
    [[ " ${names[*]} " != *" $name "* ]] || refuse "two sources are named $name"
    names+=("$name")
    # A copy is replaced when its source has changed; nothing else may ever be.
    [[ ! "$source" -ef "$target/$name" ]] || refuse "--to ($target) is the folder in which $source is"
    [[ ! -e "$target/$name" || -f "$target/.$name.origin" ]] ||
        refuse "$target/$name is there already, and no copy of this script's: it has no $target/.$name.origin"
done

listing() { # listing FORMAT PATH: a line for each file in it, or for the file itself
    find -L "$2" -type f -printf "$1\n" | LC_ALL=C sort
}
hashes() { # hashes PATH
    if [[ -d "$1" ]]; then (cd "$1" && find -L . -type f -exec sha256sum {} + | LC_ALL=C sort); else sha256sum <"$1"; fi
}
same_content() { # same_content SOURCE COPY
    [[ "$(listing '%P %s' "$1")" == "$(listing '%P %s' "$2")" ]] || return 1
    [[ "$verify" == sizes || "$(hashes "$1")" == "$(hashes "$2")" ]]
}

stage() { # stage SOURCE: makes DIR/NAME and, beside it, what it was copied from
    local source="$1" name copy partial origin made_from
    name="$(basename "$source")"
    copy="$target/$name" partial="$target/.$name.partial" origin="$target/.$name.origin"
    made_from="$(listing '%P %s %T@' "$source")"
    if [[ -e "$copy" && -f "$origin" && "$(<"$origin")" == "$made_from" ]] && same_content "$source" "$copy"; then
        echo "$copy is there already"
        return
    fi
    rm -rf "$partial" "$copy" "$origin"
    cp -rL "$source" "$partial"
    if ! same_content "$source" "$partial"; then
        rm -rf "$partial"
        echo "error: the copy of $source on $(uname -n) is not what was read; is the disk full?" >&2
        exit 1
    fi
    echo "$made_from" >"$origin" # before the copy has its name: one without would be somebody else's
    mv -T "$partial" "$copy"
    echo "$copy copied from $source"
}

if [[ "$dry_run" == yes ]]; then
    for source in "$@"; do
        printf 'cp -rL %q %q # its name once %s agree\n' "$source" "$target/$(basename "$source")" "$verify"
    done
    exit
fi
mkdir -p "$target"
exec 9>"$target/.lock"
flock 9
for source in "$@"; do
    stage "$source"
done
