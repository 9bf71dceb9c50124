//! See `regent_decoders::TARGETS`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (regent_decoders::target("server_frames").decode)(bytes));
