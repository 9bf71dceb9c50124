//! What applying one operation costs, in a state of 9,000 sessions: `cargo bench -p regent-micro --bench apply`.

#![allow(missing_docs)] // of what criterion's macros make

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use regent_state::{Operation, Outcome};
use regent_types::LeaseName;

use regent_micro::{SESSIONS, World, create, patch, request};

// The allocator that the program has.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn apply(c: &mut Criterion) {
    let full = World::filled();
    let mut group = c.benchmark_group("apply");

    let mut world = full.clone();
    let mut number = 0;
    group.bench_function("patch of 256 bytes", |b| {
        b.iter_batched(
            || {
                number += 1;
                patch(number)
            },
            |request| black_box(world.apply(&request)),
            BatchSize::SmallInput,
        );
    });

    let mut number = SESSIONS;
    group.bench_function("create a session that waits", |b| {
        b.iter_batched(
            || {
                number += 1;
                (full.clone(), create(number))
            },
            |(mut world, request)| black_box(world.apply(&request)),
            BatchSize::SmallInput,
        );
    });

    let mut world = full.clone();
    let name = LeaseName::new("the-lease").expect("a word is a name");
    let acquire = request(Operation::AcquireLease {
        name: name.clone(),
        holder: "worker".to_owned(),
        ttl_ms: 5_000,
    });
    group.bench_function("a lease granted and given back", |b| {
        b.iter(|| {
            let Outcome::Lease(lease) = world.apply(&acquire) else {
                unreachable!("it is free");
            };
            let (name, token) = (name.clone(), lease.token);
            world.apply(&request(Operation::ReleaseLease { name, token }))
        });
    });
    group.finish();
}

/// What readers take after each batch, and what a snapshot begins with.
fn publish(c: &mut Criterion) {
    let full = World::filled();
    c.bench_function("a copy of the state", |b| {
        b.iter(|| black_box(full.state.clone()));
    });
    c.bench_function("digest of the content", |b| {
        b.iter(|| black_box(full.state.content_digest()));
    });
}

criterion_group!(benches, apply, publish);
criterion_main!(benches);
