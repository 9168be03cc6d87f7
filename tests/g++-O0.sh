#!/bin/sh
# CXX of the tests (tests/conftest.py): g++ without the optimisation that takes longer than what it speeds up, and of
# hls4ml's two standards, of which it takes what the compiler knows, the one that is compiled in three quarters the time.
for word do
    shift
    case "$word" in
        -O3) word=-O0 ;;
        -std=c++23) word=-std=c++11 ;;
    esac
    set -- "$@" "$word"
done
exec g++ "$@"
