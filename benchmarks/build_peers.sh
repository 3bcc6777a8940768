#!/bin/sh
# Build the peers of `make bench-trend-peers` that have no wheels, from their published sources: build_peers.sh PYTHON
#
# Debian's packages: g++, git, liblapack-dev (proxTV), libgsl-dev (pygfl). A peer that does not build is skipped.

python=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export CFLAGS="${CFLAGS:--O3}"

install() {
    "$python" -m pip install --quiet "$@"
}

moved='rv(o.rv), K(o.K), first_k(o.first_k), sX(o.sX) { o.sX = nullptr; }'

attempt() { # name, what it needs, command
    name=$1 needs=$2
    shift 2
    if ! "$@" >"$folder/log" 2>&1; then
        tail -n 20 "$folder/log" >&2
        echo "SKIPPED $name: it did not build; it needs $needs" >&2
    fi
}

# The sources of 3.3.0 with functions that return: those of 3.2.1 end undefined.
prox_tv() {
    install prox-tv-sdist==3.3.1
}

# The source distribution lacks the headers.
pygfl() {
    install --no-deps 'pygfl @ git+https://github.com/tansey/gfl@30046ea13e63e2d28000e8b8fb4d2e7c92302a8c'
}

# Compiled against the NumPy that is installed, and the proximal operator alone: the rest takes long.
cut_pursuit() {
    source=$folder/pycut-pursuit-0.1.3
    install setuptools wheel &&
        "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$folder" \
            pycut-pursuit==0.1.3 &&
        tar -xf "$source.tar.gz" -C "$folder" &&
        # A returned Split_info is copied, and its buffer freed twice: move it.
        sed -i "s/^ *~Split_info();/& Split_info(Split_info\&\& o) : $moved/" "$source/include/cut_pursuit.hpp" &&
        sed -i 's/ext_modules=.*/ext_modules=[mod_cp_prox_tv]/' "$source/setup.py" &&
        install --no-deps --no-build-isolation "$source"
}

attempt proxTV 'g++ and liblapack-dev' prox_tv
attempt pygfl 'gcc, git and libgsl-dev' pygfl
attempt 'cut pursuit' 'g++ with OpenMP' cut_pursuit
