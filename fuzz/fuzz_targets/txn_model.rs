//! Arbitrary bytes as a sequence of requests, to the store and to its plain twin: they must agree.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| quorate::model::run(bytes));
