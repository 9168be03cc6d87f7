#!/bin/sh
# CXX of the tests (tests/conftest.py): g++ without the optimisation that takes longer than what it speeds up.
for word do
    shift
    [ "$word" = -O3 ] && word=-O0
    set -- "$@" "$word"
done
exec g++ "$@"
