//! Links what stands in for the operating system's randomness; see `src/random.c`.

fn main() {
    println!("cargo::rerun-if-changed=src/random.c");
    // The linker takes an object of a library only where a symbol is missing; this one is to take precedence.
    let objects = cc::Build::new().file("src/random.c").compile_intermediates();
    for object in objects {
        println!("cargo::rustc-link-arg-bins={}", object.display());
    }
}
