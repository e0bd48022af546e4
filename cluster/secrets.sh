#!/usr/bin/env bash
# Makes the two secrets of a cluster where they are missing, readable by you alone, and shows neither:
#   ~/.ray/auth_token       what Ray asks of everybody who speaks to the cluster
#   ~/.mlflow/credentials   the login of the tracking server
# Every recipe takes them from there. Keep the files to come back to a cluster; delete them for new ones.
set -euo pipefail
umask 077

random() { python3 -c 'import secrets; print(secrets.token_hex(32), end="")'; }

token=$HOME/.ray/auth_token
login=$HOME/.mlflow/credentials
mkdir -p "$HOME/.ray" "$HOME/.mlflow"
if [[ ! -s $token ]]; then
    random > "$token"
fi
if [[ ! -s $login ]]; then
    printf '[mlflow]\nmlflow_tracking_username = cosa\nmlflow_tracking_password = %s\n' "$(random)" > "$login"
fi
chmod 600 "$token" "$login"
echo "$token and $login are there, readable by you alone"
