#!/usr/bin/env bash
# Installs what Landfall's build, lab and tests need on Debian 12, and nothing that is there already.
#
#   hack/setup.sh lab     what the lab needs: Debian packages and the eBPF toolchain
#   hack/setup.sh test    all that, and the control plane of the end-to-end tests, Helm, CNI's own plugins, a mail server
#   hack/setup.sh paths   print where the control plane's binaries are, as shell assignments
#
# What it builds goes to ${XDG_CACHE_HOME:-~/.cache}/landfall, keyed by what it was built from.
# Exit codes: 0 all there, 1 something could not be installed, 2 usage.
set -euo pipefail
cd "$(dirname "$0")/.."

BPF_LINKER_VERSION=0.13.0
LLVM_VERSION=22
HELM_VERSION=v4.3.1
CNI_VERSION=v1.3.1
CNI_PLUGINS_VERSION=v1.9.1
KUBERNETES_VERSION=1.36.2
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/landfall"
export PATH="$HOME/.cargo/bin:/usr/local/go/bin:/usr/sbin:/sbin:$PATH"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

# Where the control plane binary of this checkout lives: keyed by its sources and its flags.
kubernetes_dir() {
    local key
    key=$(cat tests/kubernetes/{go.mod,go.sum,main.go} <(echo "$KUBERNETES_VERSION") | sha256sum | cut -c1-16)
    echo "$CACHE/kubernetes-$KUBERNETES_VERSION-$key"
}

helm_dir() { echo "$CACHE/helm-$HELM_VERSION"; }

cni_dir() { echo "$CACHE/cni-$CNI_VERSION-$CNI_PLUGINS_VERSION"; }

installed() { [[ $(dpkg-query -W -f='${Status}' "$1" 2>/dev/null) == "install ok installed" ]]; }

# What the lab needs, and whatever else is named.
packages() {
    local wanted=(bpftool conntrack ethtool iproute2 iputils-ping jq libzstd-dev "llvm-$LLVM_VERSION-dev" nftables
        rust-web-src rustc-web tcpdump zlib1g-dev "$@") missing=()
    for package in "${wanted[@]}"; do
        installed "$package" || missing+=("$package")
    done
    ((${#missing[@]} == 0)) && return
    [[ $(id -u) == 0 ]] || die "missing packages: ${missing[*]}; run as root, or install them"
    say "installing packages: ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
}

# Debian's mail server asks at its installation what it is for: for nothing but tests. It is not to be started.
mail_server() {
    if installed postfix || [[ $(id -u) != 0 ]]; then return; fi
    echo "postfix postfix/main_mailer_type select No configuration" | debconf-set-selections
}

rust() {
    command -v cargo >/dev/null || die "cargo is not on the path: install Rust 1.95 with rustup"
    # The BPF target wants a compiler whose LLVM is the linker's, and the library's sources beside it.
    if command -v rustup >/dev/null && ! rustup toolchain list | grep -q '^debian'; then
        say "linking Debian's rustc as toolchain 'debian'"
        rustup toolchain link debian /usr
    fi
    if [[ $(bpf-linker --version 2>/dev/null || true) != *" $BPF_LINKER_VERSION"* ]]; then
        say "building bpf-linker $BPF_LINKER_VERSION (about a minute)"
        LLVM_PREFIX="/usr/lib/llvm-$LLVM_VERSION" cargo install --quiet bpf-linker \
            --version "$BPF_LINKER_VERSION" --no-default-features --features "llvm-$LLVM_VERSION"
    fi
}

go_tools() {
    command -v go >/dev/null || die "go is not on the path: install Go 1.26"
    export GOTOOLCHAIN=local
    local kubernetes helm cni
    kubernetes=$(kubernetes_dir) helm=$(helm_dir) cni=$(cni_dir)
    if [[ ! -x $kubernetes/kubernetes ]]; then
        say "building Kubernetes $KUBERNETES_VERSION and etcd (about five minutes, once)"
        mkdir -p "$kubernetes"
        local version=k8s.io/component-base/version
        (cd tests/kubernetes && go build -trimpath -ldflags "-s -w -X $version.gitVersion=v$KUBERNETES_VERSION \
-X $version.gitMajor=1 -X $version.gitMinor=$(cut -d. -f2 <<<"$KUBERNETES_VERSION")" -o "$kubernetes/kubernetes.new" .)
        mv "$kubernetes/kubernetes.new" "$kubernetes/kubernetes"
    fi
    if [[ ! -x $helm/helm ]]; then
        say "building Helm $HELM_VERSION (about two minutes, once)"
        GOBIN="$helm" go install "helm.sh/helm/v4/cmd/helm@$HELM_VERSION"
    fi
    if [[ ! -x $cni/cnitool ]]; then
        say "building CNI's own plugins $CNI_PLUGINS_VERSION (seconds, once)"
        local plugins=github.com/containernetworking/plugins/plugins
        GOBIN="$cni" go install "$plugins/main/bridge@$CNI_PLUGINS_VERSION" "$plugins/main/ptp@$CNI_PLUGINS_VERSION" \
            "$plugins/ipam/host-local@$CNI_PLUGINS_VERSION"
        GOBIN="$cni" go install "github.com/containernetworking/cni/cnitool@$CNI_VERSION"
    fi
}

case "${1:-}" in
    lab) packages; rust ;;
    # kube-proxy in iptables mode runs it.
    test) mail_server; packages iptables postfix; rust; go_tools ;;
    paths)
        echo "LANDFALL_KUBERNETES=$(kubernetes_dir)/kubernetes"
        echo "LANDFALL_HELM=$(helm_dir)/helm"
        echo "LANDFALL_CNI_PLUGINS=$(cni_dir)"
        exit 0
        ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
esac
say "all there"
