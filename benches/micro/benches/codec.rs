//! What encoding and decoding cost, on the way into the log and back: `cargo bench -p regent-micro --bench codec`.

#![allow(missing_docs)] // of what criterion's macros make

use std::hint::black_box;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use regent_micro::{SESSIONS, World, create, patch};
use regent_raft::workbench::{decode_record, encode_record};
use regent_state::{Applied, Request, decode_applied, encode_applied};

// The allocator that the program has.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn codec(c: &mut Criterion) {
    let mut world = World::filled();
    for (what, request) in [("patch of 256 bytes", patch(1)), ("create", create(SESSIONS))] {
        let applied: Applied = Ok(world.apply(&request));
        let body = request.encode();
        let answer = encode_applied(&applied);
        let shared = Bytes::from(body.clone());
        let record = encode_record(1, 1, shared.clone());

        let mut group = c.benchmark_group(what);
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function("encode the request", |b| b.iter(|| black_box(&request).encode()));
        group.bench_function("decode the request", |b| {
            b.iter(|| Request::decode(black_box(&body)).expect("it was just encoded"));
        });
        group.throughput(Throughput::Bytes(answer.len() as u64));
        group.bench_function("encode the outcome", |b| {
            b.iter(|| encode_applied(black_box(&applied)));
        });
        group.bench_function("decode the outcome", |b| {
            b.iter(|| decode_applied(black_box(&answer)).expect("it was just encoded"));
        });
        group.throughput(Throughput::Bytes(record.len() as u64));
        group.bench_function("encode the log record", |b| {
            b.iter(|| encode_record(1, 1, black_box(shared.clone())));
        });
        group.bench_function("decode the log record", |b| {
            b.iter(|| decode_record(1, black_box(&record)).expect("it was just encoded"));
        });
        group.finish();
    }
}

criterion_group!(benches, codec);
criterion_main!(benches);
