#!/usr/bin/env bash
# What cluster/gcp.yaml needs from your Google Cloud project, made where it is missing: a shared folder (Filestore).
#
#   bash cluster/gcp-setup.sh PROJECT IMAGE            writes cluster/my-gcp.yaml; changes nothing that is there
#   bash cluster/gcp-setup.sh PROJECT --delete         deletes the folder WITH ALL RESULTS; `ray down` first
#
# IMAGE is the image in a registry from which machines may pull without a login. The zone is that of the gcloud
# command (`gcloud config set compute/zone us-central1-a`); it must offer the machine types of gcp.yaml.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=${1:?usage: gcp-setup.sh PROJECT IMAGE, or gcp-setup.sh PROJECT --delete}
image=${2:?usage: gcp-setup.sh PROJECT IMAGE, or gcp-setup.sh PROJECT --delete}
zone=$(gcloud config get-value compute/zone 2> /dev/null)
zone=${zone:?gcloud must know a zone; run: gcloud config set compute/zone us-central1-a}

if [[ $image == --delete ]]; then
    gcloud filestore instances delete cosa --project "$project" --zone "$zone" --quiet
    echo "deleted in $zone: the shared folder \`cosa\`"
    exit 0
fi

gcloud services enable compute.googleapis.com file.googleapis.com iam.googleapis.com \
    cloudresourcemanager.googleapis.com --project "$project"
address() {
    gcloud filestore instances describe cosa --project "$project" --zone "$zone" \
        --format 'value(networks[0].ipAddresses[0])' 2> /dev/null
}
if ! address > /dev/null; then
    gcloud filestore instances create cosa --project "$project" --zone "$zone" --tier BASIC_HDD \
        --file-share name=cosa,capacity=1TB --network name=default
fi

# Ubuntu with the NVIDIA driver and Docker, the newest that Google keeps; it runs on machines without a GPU, too.
system=$(gcloud compute images list --project deeplearning-platform-release --no-standard-images \
    --filter 'family ~ ^common-cu.*-ubuntu-2204' --sort-by '~creationTimestamp' --limit 1 --format 'value(name)')
if [[ -z $system ]]; then
    echo "Google must have a system image common-cu*-ubuntu-2204, found none; put one of" \
        "\`gcloud compute images list --project deeplearning-platform-release\` into $here/gcp.yaml" >&2
    exit 1
fi

sed -e "s|@REGION@|${zone%-*}|" -e "s|@ZONE@|$zone|" -e "s|@PROJECT@|$project|" -e "s|@IMAGE@|$image|" \
    -e "s|@SYSTEM@|projects/deeplearning-platform-release/global/images/$system|" -e "s|@FILES@|$(address)|" \
    "$here/gcp.yaml" > "$here/my-gcp.yaml"
echo "wrote $here/my-gcp.yaml: zone $zone, system $system, shared folder at $(address)"
