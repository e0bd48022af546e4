#!/usr/bin/env bash
# A tracking server for one cluster: MLflow with a login, on a SQLite file and a folder, no other service needed.
#
#   bash cluster/tracking/serve.sh FOLDER [ADDRESS [PORT]]
#
# FOLDER keeps the runs; one server at a time may use it. The server answers at ADDRESS, which should be the
# machine's on its private network so that workers reach it, and always at 127.0.0.1, where a tunnel ends.
# The login is the one that MLflow's clients use: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
# ~/.mlflow/credentials. It is set when FOLDER is new. MLFLOW_BACKEND_STORE_URI, MLFLOW_ARTIFACTS_DESTINATION and
# MLFLOW_SERVER_ALLOWED_HOSTS replace what is said here; nothing secret stands on a command line.
set -euo pipefail

folder=${1:?usage: serve.sh FOLDER [ADDRESS [PORT]]}
address=${2:-127.0.0.1}
port=${3:-5000}

if [[ $address == 0.0.0.0 || $address == "::" ]]; then
    echo "ADDRESS must be one of this machine's own, got $address, which is all of them; name a private one" >&2
    exit 2
fi

credential() {
    local file=$HOME/.mlflow/credentials
    [[ -r $file ]] && sed -n "s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*//p" "$file" | head -n 1
}

MLFLOW_AUTH_ADMIN_USERNAME=${MLFLOW_TRACKING_USERNAME:-$(credential mlflow_tracking_username || true)}
MLFLOW_AUTH_ADMIN_PASSWORD=${MLFLOW_TRACKING_PASSWORD:-$(credential mlflow_tracking_password || true)}
if [[ -z $MLFLOW_AUTH_ADMIN_USERNAME || -z $MLFLOW_AUTH_ADMIN_PASSWORD ]]; then
    echo "the server must have a login, got none; run: bash cluster/secrets.sh" >&2
    exit 2
fi

umask 077
mkdir -p "$folder/artifacts"
folder=$(cd "$folder" && pwd)
cat > "$folder/auth.ini" <<INI
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///$folder/auth.db
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# Checking a password takes a tenth of a second; trials write several times a second.
auth_cache_ttl_seconds = 60
INI

export MLFLOW_AUTH_ADMIN_USERNAME MLFLOW_AUTH_ADMIN_PASSWORD
export MLFLOW_AUTH_CONFIG_PATH=$folder/auth.ini
MLFLOW_FLASK_SERVER_SECRET_KEY=$(python -c 'import secrets; print(secrets.token_hex(32))')
export MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_DISABLE_TELEMETRY=true

export MLFLOW_BACKEND_STORE_URI=${MLFLOW_BACKEND_STORE_URI:-sqlite:///$folder/mlflow.db}
export MLFLOW_ARTIFACTS_DESTINATION=${MLFLOW_ARTIFACTS_DESTINATION:-$folder/artifacts}
export MLFLOW_SERVER_ALLOWED_HOSTS=${MLFLOW_SERVER_ALLOWED_HOSTS:-$address:$port,127.0.0.1:*,localhost:*}

options="--threads 8 --graceful-timeout 5"
if [[ $address != 127.0.0.1 && $address != localhost ]]; then
    options+=" --bind 127.0.0.1:$port"
fi

exec python -m mlflow server --app-name basic-auth --host "$address" --port "$port" \
    --workers 1 --gunicorn-opts "$options"
