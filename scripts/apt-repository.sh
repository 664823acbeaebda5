#!/bin/sh
# Adds packages to a signed apt repository: scripts/apt-repository.sh DIR KEY-ID FILE.deb...
#
# Every version is kept: an older one is the way back. Made with apt-ftparchive (a pool and one index for each architecture)
# because reprepro of Debian 12 keeps one version only. DIR/scansentry.gpg is the public key for `signed-by`.
set -eu

dir=${1:?apt-repository: a directory is expected}
key=${2:?apt-repository: the id of a secret key is expected}
shift 2
for tool in apt-ftparchive gpg; do
    command -v $tool >/dev/null || {
        echo "apt-repository: $tool is not installed; apt install apt-utils gpg" >&2
        exit 1
    }
done

mkdir -p "$dir/pool"
[ $# -eq 0 ] || cp -- "$@" "$dir/pool/"
cd "$dir"
for architecture in amd64 arm64 armhf; do
    index=dists/stable/main/binary-$architecture
    mkdir -p "$index"
    apt-ftparchive --arch "$architecture" packages pool >"$index/Packages"
    gzip -9nkf "$index/Packages"
done
apt-ftparchive -o APT::FTPArchive::Release::Origin=ScanSentry -o APT::FTPArchive::Release::Label=ScanSentry \
    -o APT::FTPArchive::Release::Suite=stable -o APT::FTPArchive::Release::Codename=stable \
    -o APT::FTPArchive::Release::Components=main -o "APT::FTPArchive::Release::Architectures=amd64 arm64 armhf" \
    release dists/stable >Release.new
mv Release.new dists/stable/Release
gpg --batch --yes --local-user "$key" --clearsign --output dists/stable/InRelease dists/stable/Release
gpg --batch --yes --local-user "$key" --armor --detach-sign --output dists/stable/Release.gpg dists/stable/Release
gpg --batch --yes --export --output scansentry.gpg "$key"
