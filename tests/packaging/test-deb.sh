#!/bin/bash
# The package as a Debian user meets it: tests/packaging/test-deb.sh FILE.deb NEWER.deb
#
# Installed, configured, run under its real unit and sandbox, broken, updated from a signed repository, rolled out with the
# Ansible role, removed and purged, in a Debian 12 that systemd-nspawn boots with systemd as PID 1, without a network. Needs root,
# debootstrap and systemd-container. The base system is made once, in target/deb-root/base.
set -euo pipefail

deb=$(realpath "$1") newer=$(realpath "$2")
cd "$(dirname "$0")/../.."
work=target/deb-root
base=$work/base
root=$work/run
log=$work/test-deb.log

[ "$(id -u)" = 0 ] || {
    echo "test-deb: root is needed to boot a system in a container" >&2
    exit 1
}
missing=
for package in debootstrap systemd-container apt-utils gpg lintian; do
    dpkg -s $package >/dev/null 2>&1 || missing="$missing $package"
done
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086  # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

if [ ! -e "$base/.ready" ]; then
    echo "test-deb: making a Debian 12 in $base"
    mkdir -p $work
    [ -x $base/bin/bash ] || debootstrap --variant=minbase bookworm $base >$log
    cp /etc/resolv.conf $base/etc/
    DEBIAN_FRONTEND=noninteractive chroot $base sh -c "apt-get update -qq && apt-get install -y -qq --no-install-recommends \
        systemd systemd-sysv ca-certificates libstdc++6 mosquitto mosquitto-clients dcmtk ansible-core python3-apt gpgv procps" >>$log 2>&1
    touch $base/.ready
fi

step() { echo "test-deb: $*"; }
fail() {
    echo "test-deb: FAILED: $*" >&2
    on journalctl -u scansentry -u scansentry-storescp --no-pager -n 40 >&2 2>/dev/null || true
    exit 1
}

step "lintian"
lintian --fail-on error --tag-display-limit 0 "$deb" 2>&1 | grep -v "root privileges" || [ "${PIPESTATUS[0]}" = 0 ] || fail "lintian"

rm -rf $root
cp -a --reflink=auto $base $root
systemd-nspawn --quiet --register=no --keep-unit --private-network --directory=$root --boot </dev/null >$work/console.log 2>&1 &
container=$!
leader=
stop() {
    # systemd-nspawn does not take its system down with it.
    [ -z "$leader" ] || kill -s KILL "$leader" 2>/dev/null || true
    wait $container 2>/dev/null || true
}
trap stop EXIT

# Runs a command inside.
on() { nsenter --target "$leader" --all --wdns=/ env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"; }

# Reads to the end, so that what is before it in a pipe does not fail.
has() { grep "$@" >/dev/null; }

# Waits for a command to succeed.
eventually() { # WHAT COMMAND...
    local what=$1
    shift
    for _ in $(seq 240); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.5
    done
    fail "waited too long for $what"
}
show() { on systemctl show --value -p "$1" "${2:-scansentry}"; }
classified() { on scansentry status --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["counts"]["classified"])'; }
has_classified() { [ "$(classified)" -ge "$1" ]; }
running_with() { [ "$(show NRestarts)" = "$1" ] && [ "$(show ActiveState)" = active ]; }
status_says() { show StatusText | has "$1"; }
# Puts COUNT generated slices into FOLDER, by rename.
export_slices() { # FOLDER COUNT SEED FORMAT
    on scansentry simulate --to "$1" --count "$2" --seed "$3" --format "$4" --rate 50 >/dev/null
}

eventually "the container" pgrep -P $container
leader=$(pgrep -P $container)
eventually "systemd" on systemctl is-active multi-user.target
on sh -c 'install -d /srv/scanner/export && printf "listener 1883 127.0.0.1\npassword_file /etc/mosquitto/users\n" >/etc/mosquitto/conf.d/test.conf &&
    touch /etc/mosquitto/users && chown mosquitto /etc/mosquitto/users && mosquitto_passwd -b /etc/mosquitto/users mri-1 secret && chown mosquitto /etc/mosquitto/users && systemctl restart mosquitto' 2>/dev/null
rmdir $root/srv/scanner/export
cp "$deb" $root/root/first.deb

step "install"
output=$(on apt-get install -y -qq /root/first.deb 2>&1) || fail "$output"
grep -q "not started yet: watch.folder" <<<"$output" || fail "no word about what to edit: $output"
grep -qi warning <<<"$output" && fail "$output"
[ "$(show ActiveState)" = inactive ] && on systemctl is-enabled --quiet scansentry || fail "not installed as enabled and not yet started"
for unit in scansentry-dashboard scansentry-storescp; do
    on systemctl is-enabled --quiet $unit && fail "$unit is enabled"
done
[ "$(on stat -c '%a %U' /etc/scansentry/credentials)" = "700 root" ] || fail "/etc/scansentry/credentials"
on test -e /usr/share/man/man1/scansentry.1.gz -a -e /usr/share/doc/scansentry/THIRD-PARTY.gz || fail "documentation"
on bash -c '. /usr/share/bash-completion/completions/scansentry; complete -p scansentry' >/dev/null || fail "completion"

step "one edit, and it runs"
install -d $root/srv/scanner/export
sed -i 's/^#folder/folder/; s/^#username/username/; s/^#password_file/password_file/' $root/etc/scansentry/config.toml
(umask 077 && echo secret >$root/etc/scansentry/credentials/mqtt-password)
on systemctl start scansentry || fail "it does not start"
[ "$(show ActiveState)" = active ] && [ "$(show User)" = scansentry ] || fail "not active"
[ "$(on stat -c '%a %U' /var/lib/scansentry)" = "700 scansentry" ] || fail "the state directory's owner and mode"
export_slices /srv/scanner/export 4 1 png
eventually "four results" has_classified 4
health() { on mosquitto_sub -u mri-1 -P secret -t scansentry/radiology/mri-1/health -C 1 -W 5; }
health_ok() { health | has '"state":"ok"'; }
eventually "the retained health" health_ok
eventually "the status line" status_says "^idle; 4 classified, 0 rejected; waiting: 0 files, 0 messages$"
on scansentry check >/dev/null || fail "check"
on scansentry classify "/srv/scanner/export/$(ls $root/srv/scanner/export | head -n 1)" | has '"error":null' || fail "classify"
exposure=$(on systemd-analyze security scansentry --no-pager | tail -n 1)
on journalctl -u scansentry -o json --no-pager | has '"F_DECISION":"' || fail "no journal fields"
memory=$(on sed -n "s/^VmHWM:[[:space:]]*\([0-9]*\).*/\1/p" "/proc/$(show MainPID)/status")

step "another model under the running daemon, and back"
pid=$(show MainPID)
model_says() { health | has "\"version\":\"$1\",\"sha256\""; }
shipped=$(sed -n 's/^version = "\(.*\)"$/\1/p' $root/usr/share/scansentry/models/braintumor/manifest.toml)
# Readable by root only.
on sh -c 'umask 077 && cp -r /usr/share/scansentry/models/braintumor /root/model && sed -i "s/^version = .*/version = \"9-test\"/" /root/model/manifest.toml'
on scansentry model install /root/model | has "installed: braintumor 9-test" || fail "model install"
[ -z "$(on find /var/lib/scansentry ! -user scansentry)" ] || fail "not all of the state directory is the daemon's"
eventually "the other model" model_says 9-test
on scansentry model show --json | has '"place":"installed"' || fail "model show"
on scansentry model rollback | has "back to: braintumor $shipped (configured)" || fail "model rollback"
eventually "the model of before" model_says "$shipped"
[ "$(show MainPID)" = "$pid" ] && [ "$(show ActiveState)" = active ] || fail "a swap is not a restart"

step "reload, crash, watchdog"
pid=$(show MainPID)
on systemctl reload scansentry
eventually "the reload" on sh -c 'journalctl -u scansentry --no-pager | grep -q "configuration read again"'
[ "$(show MainPID)" = "$pid" ] && [ "$(show ActiveState)" = active ] || fail "a reload is not a restart"
on kill -KILL "$pid"
eventually "the restart after a crash" running_with 1
install -d $root/run/systemd/system/scansentry.service.d
on sh -c 'mkdir -p /run/systemd/system/scansentry.service.d && printf "[Service]\nWatchdogSec=6\n" >/run/systemd/system/scansentry.service.d/test.conf && systemctl daemon-reload && systemctl restart scansentry'
inside=$(show MainPID)
outside=$(grep -l "^NSpid:.*[[:space:]]$inside\$" /proc/[0-9]*/status 2>/dev/null | xargs grep -l '^Name:.scansentry' | cut -d / -f 3 | head -n 1)
sleep infinity | python3 tests/it/freeze.py "$outside" store >/dev/null &
freezer=$!
eventually "the watchdog" on sh -c 'journalctl -u scansentry --no-pager | grep -q "Watchdog timeout"'
kill $freezer $(pgrep -P $$ -x sleep) 2>/dev/null || true
eventually "the restart after the watchdog" running_with 1
on sh -c 'rm -r /run/systemd/system/scansentry.service.d && systemctl daemon-reload && systemctl restart scansentry'

step "a folder that comes later, and a configuration that cannot work"
on mount -t tmpfs tmpfs /srv/scanner/export
export_slices /srv/scanner/export 2 100 jpeg
eventually "results from the mount" has_classified 6
echo 'nonsense = 1' >$root/etc/scansentry/conf.d/99.toml
on systemctl restart scansentry 2>/dev/null && fail "it started with nonsense"
sleep 7
[ "$(show ActiveState)/$(show ExecMainStatus)" = failed/78 ] || fail "not stopped for good with 78: $(show ActiveState)/$(show ExecMainStatus)"
on journalctl -u scansentry --no-pager | has "nonsense: is not a known key" || fail "the journal does not say what is wrong"
rm $root/etc/scansentry/conf.d/99.toml
on systemctl restart scansentry

step "export folders of another group, and under /home"
# PATH OWNER:GROUP MODE DROP-IN RESULTS
other_folder() {
    on install -d -m "$3" -o "${2%:*}" -g "${2#*:}" "$1"
    printf '[watch]\nfolder = "%s"\n' "$1" >$root/etc/scansentry/conf.d/20-folder.toml
    on sh -c "mkdir -p /run/systemd/system/scansentry.service.d && printf '[Service]\n$4\n' >/run/systemd/system/scansentry.service.d/test.conf && systemctl daemon-reload && systemctl restart scansentry"
    export_slices "$1" 2 "${5}00" png
    eventually "results from $1" has_classified "$5"
}
on groupadd scanner
other_folder /srv/group root:scanner 0750 SupplementaryGroups=scanner 8
other_folder /home/scanner/export root:root 0755 'ProtectHome=tmpfs\nBindReadOnlyPaths=-/home/scanner/export' 10
on rm -r /run/systemd/system/scansentry.service.d
on systemctl daemon-reload

step "DICOM over the network"
on systemctl start scansentry-storescp
printf '[watch]\nfolder = "/var/lib/scansentry-storescp/export"\n' >$root/etc/scansentry/conf.d/20-storescp.toml
on systemctl restart scansentry
export_slices /root/phantoms 3 200 jpeg
on sh -c 'for f in /root/phantoms/*; do img2dcm -k Modality=MR "$f" "$f.dcm" && rm "$f"; done' >/dev/null
eventually "the receiver" on sh -c 'storescu -xy localhost 11112 -aec SCANSENTRY +sd +r /root/phantoms'
eventually "results from it" has_classified 13
[ -z "$(ls -A $root/var/lib/scansentry-storescp/export/.incoming)" ] || fail "left in .incoming"
ls $root/var/lib/scansentry-storescp/export | has -i "phantom\|slice" && fail "a name of the peer's got through"
receiver=$(on systemd-analyze security scansentry-storescp --no-pager | tail -n 1)
rm $root/etc/scansentry/conf.d/20-*.toml

step "update from a signed repository"
export GNUPGHOME=$PWD/$work/gnupg
rm -rf "$GNUPGHOME"
mkdir -m 700 "$GNUPGHOME"
gpg --batch --quiet --passphrase '' --quick-generate-key 'ScanSentry test <test@example.org>' default default never 2>/dev/null
key=$(gpg --quiet --no-auto-check-trustdb --list-keys --with-colons | sed -n 's/^fpr:*\([0-9A-F]*\):$/\1/p' | head -n 1)
scripts/apt-repository.sh $root/srv/repository "$key" "$deb" "$newer" 2>$work/repository.log || fail "$(cat $work/repository.log)"
rm -f $root/etc/apt/sources.list
cp $root/srv/repository/scansentry.gpg $root/usr/share/keyrings/
echo "deb [signed-by=/usr/share/keyrings/scansentry.gpg] file:/srv/repository stable main" >$root/etc/apt/sources.list.d/scansentry.list
on apt-get update -qq 2>&1 | grep -v '^$' && fail "apt does not like the repository"
pid=$(show MainPID) config=$(sha256sum <$root/etc/scansentry/config.toml) keyfile=$(sha256sum <$root/var/lib/scansentry/pseudonym.key)
output=$(on apt-get install -y -qq scansentry 2>&1) || fail "$output"
version() { on dpkg-query -W -f '${Version}' scansentry; }
[ "$(version)" = "$(dpkg-deb -f "$newer" Version)" ] || fail "not updated"
[ "$(show MainPID)" != "$pid" ] && [ "$(show ActiveState)" = active ] || fail "not restarted by the update"
[ "$(sha256sum <$root/etc/scansentry/config.toml)" = "$config" ] && [ "$(sha256sum <$root/var/lib/scansentry/pseudonym.key)" = "$keyfile" ] || fail "the update changed configuration or state"
[ "$(classified)" = 13 ] || fail "the ledger was not kept"

step "remove, purge"
on apt-get remove -y -qq scansentry >/dev/null 2>&1
[ "$(show ActiveState)" = inactive ] && [ ! -e $root/usr/bin/scansentry ] || fail "not removed"
[ -e $root/var/lib/scansentry/ledger.sqlite3 ] && [ -e $root/etc/scansentry/config.toml ] || fail "remove took configuration or state"
on apt-get purge -y -qq scansentry >/dev/null 2>&1
left=$(ls -d $root/etc/scansentry $root/var/lib/scansentry* $root/etc/default/scansentry* $root/usr/*/scansentry $root/etc/systemd/system/*/scansentry* 2>/dev/null || true)
[ -z "$left" ] || fail "purge left $left"

step "roll-out with Ansible"
cp -r docs/ansible $root/root/
cp $root/srv/repository/scansentry.gpg $root/root/ansible/
rm $root/etc/apt/sources.list.d/scansentry.list $root/usr/share/keyrings/scansentry.gpg
cat >$root/root/ansible/board.yml <<'Y'
scansentry_repository: file:/srv/repository
scansentry_health_command: mosquitto_sub -u mri-1 -P secret -C 1 -W 10 -t scansentry/{{ scansentry_site }}/{{ scansentry_device }}/health
scansentry_credentials: {mqtt-password: secret}
scansentry_config:
  watch: {folder: /srv/scanner/export}
  mqtt: {username: mri-1, password_file: /run/credentials/scansentry.service/secret_mqtt-password}
Y
play() { on sh -c 'cd /root/ansible && printf "[scanners]\nlocalhost ansible_connection=local\n" >inventory.ini && ansible-playbook -i inventory.ini site.yml -e @board.yml "$@"' play "$@" >$work/ansible.log 2>&1; }
first=$(dpkg-deb -f "$deb" Version)
play -e "scansentry_version=$first" || fail "$(tail -n 40 $work/ansible.log)"
[ "$(version)" = "$first" ] && health_ok || fail "not rolled out"
play -e "scansentry_version=$first" || fail "$(tail -n 40 $work/ansible.log)"
grep -q 'changed=0 ' $work/ansible.log || fail "the second run changed something: $(grep -B3 changed: $work/ansible.log)"
play || fail "$(tail -n 40 $work/ansible.log)"
[ "$(version)" = "$(dpkg-deb -f "$newer" Version)" ] || fail "not updated by the role"
play -e "scansentry_version=$first" || fail "$(tail -n 40 $work/ansible.log)"
[ "$(version)" = "$first" ] || fail "no way back"
cp -r $root/usr/share/scansentry/models/braintumor $root/root/bundle
printf 'scansentry_model: {name: braintumor-9, source: /root/bundle}\n' >$root/root/ansible/model.yml
play -e "scansentry_version=$first" -e @model.yml || fail "$(tail -n 40 $work/ansible.log)"
[ "$(show ActiveState)" = active ] && grep -q scansentry-models/braintumor-9 $root/etc/scansentry/conf.d/50-fleet.toml || fail "the model was not rolled out"
echo x >>$root/root/bundle/model.tflite
sed -i s/braintumor-9/braintumor-10/ $root/root/ansible/model.yml
play -e "scansentry_version=$first" -e @model.yml -e scansentry_health_retries=2 && fail "a damaged model passed the gate"
grep -q "the configuration of before is back" $work/ansible.log || fail "$(tail -n 40 $work/ansible.log)"
[ "$(show ActiveState)" = active ] && grep -q scansentry-models/braintumor-9 $root/etc/scansentry/conf.d/50-fleet.toml || fail "the model of before is not back"

step "all passed; peak memory after four results $memory kB; $exposure; $receiver"
