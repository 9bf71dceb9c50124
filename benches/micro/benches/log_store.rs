//! What the log costs by itself: entries that are appended together and made durable by one sync, as they are when a
//! sync is in flight while they arrive. On the disk of the target folder: `cargo bench -p regent-micro --bench log_store`.

#![allow(missing_docs)] // of what criterion's macros make

use std::path::Path;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use regent_raft::workbench::Workbench;
use regent_raft::{LogStore, MemoryDisk};

/// Bytes of an operation: a small write by REST has about so many.
const BODY: usize = 300;
/// Entries appended together.
const BATCHES: [u64; 4] = [1, 8, 64, 512];
/// The log is purged down to half of so many entries, as it is behind snapshots.
const HELD: u64 = 50_000;

// The allocator that the program has.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn append(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime without I/O can be made");
    let folder =
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("the target folder can be written to");
    let on_disk = |store: LogStore| {
        let data: &Path = &folder.path().join(store.as_str());
        Workbench::open(data, store).expect("a new folder can be used")
    };
    let mut group = c.benchmark_group("append and sync");
    group.measurement_time(Duration::from_secs(3)).sample_size(20);
    for (store, mut log) in [
        ("sled", on_disk(LogStore::Sled)),
        ("segments", on_disk(LogStore::Segments)),
        (
            "memory",
            Workbench::on(&MemoryDisk::default()).expect("an empty disk can be used"),
        ),
    ] {
        let (mut first, mut next) = (0, 0);
        for batch in BATCHES {
            group.throughput(Throughput::Elements(batch));
            group.bench_with_input(BenchmarkId::new(store, batch), &batch, |b, batch| {
                b.iter(|| {
                    runtime.block_on(async {
                        let bodies = (0..*batch).map(|_| vec![7; BODY]).collect();
                        log.append(1, next, bodies).await.expect("the disk works");
                        next += batch;
                        if next - first > HELD {
                            first = next - HELD / 2;
                            log.purge(first - 1).await.expect("the disk works");
                        }
                    });
                });
            });
        }
        runtime.block_on(log.close());
    }
    group.finish();
}

criterion_group!(benches, append);
criterion_main!(benches);
