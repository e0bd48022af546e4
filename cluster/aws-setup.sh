#!/usr/bin/env bash
# What cluster/aws.yaml needs from your AWS account, made where it is missing: a security group, a shared folder.
#
#   bash cluster/aws-setup.sh IMAGE            writes cluster/my-aws.yaml; changes nothing that is there already
#   bash cluster/aws-setup.sh --delete         deletes the group and the folder WITH ALL RESULTS; `ray down` first
#
# IMAGE is the image in a registry from which machines may pull without a login. The account and the region are
# those of the aws command (`aws configure`). Everything it makes is called `cosa`, in the default network.
# COSA_SSH_FROM=203.0.113.7/32 admits SSH from that address alone; without it from anywhere, by key.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
image=${1:?usage: aws-setup.sh IMAGE, or aws-setup.sh --delete}
region=$(aws configure get region || true)
region=${AWS_REGION:-${region:?the aws command must know a region; run: aws configure}}
export AWS_REGION=$region AWS_PAGER=""

# The first word that a query finds; empty where there is none.
found() { aws "$@" --output text | awk '$1 != "None" {print $1; exit}'; }

network=$(found ec2 describe-vpcs --filters Name=is-default,Values=true --query 'Vpcs[0].VpcId')
if [[ -z $network ]]; then
    echo "the region $region must have a default network, found none; run: aws ec2 create-default-vpc" >&2
    exit 1
fi
group=$(found ec2 describe-security-groups --query 'SecurityGroups[0].GroupId' \
    --filters Name=group-name,Values=cosa Name=vpc-id,Values="$network")
files=$(found efs describe-file-systems --creation-token cosa --query 'FileSystems[0].FileSystemId')

if [[ $image == --delete ]]; then
    if [[ -n $files ]]; then
        targets=$(aws efs describe-mount-targets --file-system-id "$files" \
            --query 'MountTargets[].MountTargetId' --output text)
        for target in $targets; do
            aws efs delete-mount-target --mount-target-id "$target"
        done
        until [[ -z $(found efs describe-mount-targets --file-system-id "$files" \
            --query 'MountTargets[0].MountTargetId') ]]; do sleep 5; done
        aws efs delete-file-system --file-system-id "$files"
    fi
    if [[ -n $group ]]; then
        aws ec2 delete-security-group --group-id "$group"
    fi
    echo "deleted in $region: the shared folder and the security group \`cosa\`"
    exit 0
fi

if [[ -z $group ]]; then
    group=$(found ec2 create-security-group --group-name cosa --vpc-id "$network" \
        --description "Machines of a cosa cluster" --query GroupId)
    # Among themselves everything, from outside SSH alone, which asks for the key that \`ray up\` makes.
    aws ec2 authorize-security-group-ingress --group-id "$group" --protocol all --source-group "$group" > /dev/null
    aws ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 22 \
        --cidr "${COSA_SSH_FROM:-0.0.0.0/0}" > /dev/null
fi
if [[ -z $files ]]; then
    files=$(found efs create-file-system --creation-token cosa --encrypted \
        --throughput-mode elastic --tags Key=Name,Value=cosa --query FileSystemId)
fi
until [[ $(found efs describe-file-systems --file-system-id "$files" \
    --query 'FileSystems[0].LifeCycleState') == available ]]; do sleep 5; done
subnets=$(aws ec2 describe-subnets --filters Name=vpc-id,Values="$network" Name=default-for-az,Values=true \
    --query 'Subnets[].SubnetId' --output text)
reached=$(aws efs describe-mount-targets --file-system-id "$files" --query 'MountTargets[].SubnetId' --output text)
for subnet in $subnets; do
    if [[ " ${reached//[$'\t\n']/ } " != *" $subnet "* ]]; then
        aws efs create-mount-target --file-system-id "$files" --subnet-id "$subnet" --security-groups "$group" \
            > /dev/null
    fi
done

# Ubuntu with the NVIDIA driver and Docker, as AWS keeps it; it runs on machines without a GPU, too.
system=$(found ssm get-parameters --query 'Parameters[0].Value' --names \
    /aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id)

sed -e "s|@REGION@|$region|" -e "s|@IMAGE@|$image|" -e "s|@AMI@|$system|" \
    -e "s|@FILES@|$files.efs.$region.amazonaws.com|" "$here/aws.yaml" > "$here/my-aws.yaml"
echo "wrote $here/my-aws.yaml: region $region, system $system, shared folder $files"
