//! libFuzzer on one target, which FUZZ_TARGET names. `make fuzz` builds and runs it.
#![no_main]

use std::sync::LazyLock;

use hsm_fuzz::{Target, named};

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names the target");
    named(&name).unwrap_or_else(|| panic!("FUZZ_TARGET={name}: there is no such target"))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = (TARGET.check)(data);
});
