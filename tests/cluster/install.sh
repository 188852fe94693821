#!/bin/sh
# Installs from Debian what the tests marked `system` start: missing packages only, and none starts a service.
# Always ends well: what could not be installed is said here, and its tests are skipped with the reason.
set -eu

policy=/usr/sbin/policy-rc.d
kept=$policy.kept-by-basestone
mark='# written by tests/cluster/install.sh of Basestone'
PATH=$PATH:/usr/sbin:/sbin

say() { echo "test-system: $*"; }

missing_packages() {
    for pair in chromium:chromium sshd:openssh-server ssh:openssh-client pdsh:pdsh ip:iproute2 munged:munge \
        slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client mpirun:openmpi-bin; do
        command -v "${pair%%:*}" >/dev/null || echo "${pair#*:}"
    done
}

# Also puts back what an earlier install left that was killed: the kept file is always the machine's own.
put_policy_back() {
    if [ -e "$kept" ]; then
        mv -f "$kept" "$policy"
    elif grep -qsF "$mark" "$policy"; then
        rm -f "$policy"
    fi
}

forbid_starts() {
    put_policy_back
    [ ! -e "$policy" ] || mv "$policy" "$kept"
    printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >"$policy"
    chmod 755 "$policy"
}

install_packages() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" \
        </dev/null
}

say_missing() {
    for package in $(missing_packages); do say "$1: $package is not installed"; done
}

if [ -z "$(missing_packages)" ]; then exit 0; fi
if [ "$(id -u)" != 0 ]; then say_missing "not root"; exit 0; fi
if ! command -v apt-get >/dev/null; then say_missing "no apt-get"; exit 0; fi

exec 9>/run/lock/basestone-test-system
flock 9
trap put_policy_back EXIT
trap 'exit 130' HUP INT TERM
forbid_starts
apt-get -qq update || say "apt-get could not update its lists: no network?"
# All at once is quicker; one after another, a package that this release does not have costs only itself.
# shellcheck disable=SC2046
if ! install_packages $(missing_packages); then
    for package in $(missing_packages); do install_packages "$package" || true; done
fi
say_missing "apt-get could not install it"
