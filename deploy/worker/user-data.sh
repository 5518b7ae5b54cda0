#!/bin/bash
# User data of a spot instance with Debian 12, Ubuntu 24.04 or newer: run as root at the first boot, it installs a worker,
# which then runs whenever the machine does. Fill in the first lines.
set -euo pipefail

URL=https://train.example.org
RUN=mnist
# Whoever reads an instance's user data reads this too: let it expire, or have it fetched here from a store of secrets.
TOKEN=fst_p_...
# What pip installs: a repository as here, or a wheel; with what else the script needs, separated by spaces.
PACKAGE=git+https://example.org/freestep.git
SCRIPT=https://example.org/train.py

apt-get update -qq
apt-get install -y -qq python3-venv git curl
id freestep >/dev/null 2>&1 || useradd --system --home-dir /var/lib/freestep freestep
[ -x /opt/freestep/bin/freestep ] || { python3 -m venv /opt/freestep && /opt/freestep/bin/pip install --quiet $PACKAGE; }
install -d /etc/freestep
curl -fsSL --retry 5 "$SCRIPT" -o /etc/freestep/train.py
(umask 077 && echo "$TOKEN" >/etc/freestep/token)
chown freestep: /etc/freestep/token

cat >/etc/systemd/system/freestep-worker.service <<UNIT
[Unit]
Description=freestep worker
After=network-online.target
Wants=network-online.target
# It is started again without end.
StartLimitIntervalSec=0

[Service]
User=freestep
StateDirectory=freestep
WorkingDirectory=/var/lib/freestep
Environment=FREESTEP_URL=$URL FREESTEP_RUN=$RUN FREESTEP_TOKEN_FILE=/etc/freestep/token
# For so long the service may be away.
Environment=FREESTEP_RETRY_SECONDS=600
ExecStart=/opt/freestep/bin/python /etc/freestep/train.py
# SIGTERM has the script leave its with block, and so give its lease back; with or without one it ends with 143. Only the
# script gets the signal, not a DataLoader's workers, whose end it would take for an error.
Environment=FREESTEP_LEAVE_ON_SIGTERM=1
KillMode=mixed
SuccessExitStatus=143
TimeoutStopSec=20
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable --now freestep-worker
