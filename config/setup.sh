#!/bin/sh
# What the Makefile needs to be there. Says nothing where there is nothing to do.
#
#   config/setup.sh python              .venv with the package, its extras and the tools, at the pinned versions
#   config/setup.sh peers               what `make bench` compares with, into .venv
#   config/setup.sh servers NAME...     programs for private servers: rabbitmq postgres redis memcached
#                                       prometheus openssl; and chromium, for the tests of the page
#   config/setup.sh constraints         config/constraints.txt again, with the newest versions of everything
set -eu
cd "$(dirname "$0")/.."

extras='http,redis,memcached,sqlalchemy,otel,dev'

fail() {
    echo "setup: $*" >&2
    exit 1
}

# Run a long command: one line that says what it is for, and its output only if it fails.
quietly() {
    echo "setup: $1 ..." >&2
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

may_apt() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

# Install Debian packages, and start none of the services that come with them: a server on its standard port is not what
# was asked for.
apt_install() {
    policy=/usr/sbin/policy-rc.d
    ours=
    if [ ! -e $policy ]; then
        ours=yes
        trap 'as_root rm -f $policy' EXIT
        trap 'exit 130' INT TERM HUP
        printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
        as_root chmod 755 $policy
    fi
    quietly "apt-get update" as_root apt-get update -q
    quietly "apt-get install $*" as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends "$@"
    if [ -n "$ours" ]; then
        as_root rm -f $policy
        trap - EXIT INT TERM HUP
    fi
}

# The newest Python that will do.
find_python() {
    for python in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    fail 'Python 3.11 or newer is needed (apt-get install python3), or name one: make PYTHON=...'
}

make_venv() { # PYTHON FOLDER
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        may_apt || fail "$1 cannot make virtual environments: apt-get install python3-venv"
        apt_install python3-venv
    fi
    "$1" -m venv "$2"
}

setup_python() {
    python=$(find_python)
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        rm -rf .venv
        make_venv "$python" .venv
    fi
    quietly 'installing Python packages into .venv' \
        .venv/bin/python -m pip install --disable-pip-version-check -c config/constraints.txt -e ".[$extras]"
    touch .venv/installed
}

setup_peers() {
    quietly 'installing what the benchmarks compare with into .venv' \
        .venv/bin/python -m pip install --disable-pip-version-check -c config/constraints.txt -e ".[$extras,bench]"
    touch .venv/bench
}

# pip would write URLs for what came from elsewhere: `pip list` has names and versions only.
make_constraints() {
    folder=$(mktemp -d)
    make_venv "$(find_python)" "$folder"
    trap 'rm -rf "$folder"' EXIT
    pip="$folder/bin/python -m pip --disable-pip-version-check"
    quietly 'finding the newest versions' $pip install -e ".[$extras,bench]"
    {
        echo '# Versions that are known to work together. Made by `make constraints`.'
        $pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools | LC_ALL=C sort -f
    } >config/constraints.txt
}

installed() { # SERVER
    case $1 in
        rabbitmq) found rabbitmq-server /usr/lib/rabbitmq/bin/rabbitmq-server ;;
        postgres) found postgres /usr/lib/postgresql/*/bin/postgres ;;
        redis) found redis-server ;;
        chromium) found chromium || found chromium-browser || found google-chrome ;;
        *) found "$1" ;;
    esac
}

found() { # PROGRAM [PLACE...]
    command -v "$1" >/dev/null && return
    shift
    for place in "$@" /nowhere; do
        [ -x "$place" ] && return
    done
    return 1
}

package() { # SERVER
    case $1 in
        rabbitmq) echo rabbitmq-server ;;
        postgres) echo postgresql ;;
        redis) echo redis-server ;;
        *) echo "$1" ;;
    esac
}

setup_servers() {
    packages=
    for server in "$@"; do
        installed "$server" || packages="$packages $(package "$server")"
    done
    [ -n "$packages" ] || return 0
    may_apt || fail "programs are missing: apt-get install$packages (or use docker/compose.yaml)"
    # shellcheck disable=SC2086
    apt_install $packages
}

task=${1:-}
[ $# = 0 ] || shift
case $task in
    python) setup_python ;;
    peers) setup_peers ;;
    servers) setup_servers "$@" ;;
    constraints) make_constraints ;;
    *) fail 'usage: config/setup.sh python | peers | servers NAME... | constraints' ;;
esac
