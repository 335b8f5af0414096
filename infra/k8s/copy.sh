#!/usr/bin/env bash
# Copy the manifests to a folder of your own, and name your images there. Run it again after an
# upgrade: your overlays stay as they are, and get the images of the new version.
#   infra/k8s/copy.sh FOLDER IMAGE    IMAGE has no tag, such as ghcr.io/team/dpnet
set -euo pipefail
if [ $# != 2 ] || [[ ${2##*/} == *:* ]]; then
  sed -n '4s/^# */usage: /p' "$0" >&2
  exit 2
fi
from=$(cd "$(dirname "$0")" && pwd) to=$1 image=$2
version=$(sed -nE 's/^ *newTag: (.*)-cpu$/\1/p' "$from/base/kustomization.yaml")
mkdir -p "$to"
cp -R "$from/base" "$from/components" "$from/jobs" "$to"
for own in overlays kueue; do [ -d "$to/$own" ] || cp -R "$from/$own" "$to"; done
find "$to" -name '*.yaml' -o -name '*.json' | while read -r file; do
  sed -E -e "s#registry\.example\.com/dpnet#$image#" \
    -e "s#(launch\.image=)[^ ]+-(cpu|cuda)#\1$image:$version-\2#" "$file" >"$file.new"
  mv "$file.new" "$file"
done
