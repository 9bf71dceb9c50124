//! Every operation that was ever written must be read for ever: a log and a snapshot outlive the
//! program that wrote them. `golden/requests.txt` holds one of each variant, as hex, with its name.
//! Lines are only added (`REGENT_UPDATE_GOLDEN=1` adds those that are missing); one that no longer
//! decodes, or encodes otherwise, is a broken promise, not an outdated test.

// Clippy knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use harness::world::World;
use regent_state::{CodecError, Request, State, StateDecoder, decode_applied, encode_applied};

/// One step per operation, in a story in which it makes sense.
const STORY: &str = "\
init
user alice sessions=4 cpu=2000 memory=1Gi
password alice hash-2
quota alice sessions=5
token t1 user=alice ttl=1h
token t2 user=alice login=hash-2 ttl=1h
template mine manifest={} create-only
delete-template mine
agent dev sessions=5 platform=process region=eu labels=gpu:yes,disk:fast cpu=4000 memory=8Gi
connect dev node=2 runtime=r1 sessions=s1:running:1,s2:exited seed=r
capacity dev sessions=6
create s1 command=c1 user=alice tags=a,b idle=30m max=8h platform=process labels=gpu:yes queue cpu=100 memory=64Mi
patch s1 tags=c idle=none max=1h if-match=3 key=k1
sent c1
ack c1
complete c1 url=http://localhost metadata={}
report dev s1 running generation=1 reason=fine url=http://a metadata={}
hibernate s1 command=c2
wake s1 command=c3 reason=idle if-match=7
session-overdue s1 command=c4
place s1:c5 s2:c6
command c7 agent=dev session=s1 action=ping expires=5s
fail c7 error=broken retryable run=2
overdue c7
cancel c7
retry c7
acquire jobs holder=me ttl=5s key=k2
release jobs token=5
force-release jobs reason=why
expire jobs token=6 leadership=3/2
acquire jobs holder=me ttl=5s
campaign jobs candidate=one holder=you ttl=9s node=2 start=7 resume=3
withdraw jobs candidate=one node=2 start=7
end jobs lapsed=jobs@40
connect dev replica=two node=2 runtime=r1 sessions=s1:running:1 holds=9
abandon jobs token=9 agent=dev replica=two epoch=5
connect dev replica=two node=2 runtime=r1 sessions=s1:running:1 holds=9 since=current
stop s1 command=c8
drain dev deadline=5m
cordon dev
disconnect dev reason=bye
delete-agent dev force
delete-user alice
revoke t1
token j1 join=node ttl=1h
admit 4 token=j1
moved 4 peer=other:1
remove-member 4 reason=replaced
token j2 join=d* ttl=1h
enrol e1 agent=dev token=j2
raise-level 3
asked transfer=2
prune
";

/// All variants; the compiler makes sure that a new one is added here.
fn name(request: &Request) -> &'static str {
    use regent_state::Operation as Op;
    match request.operation {
        Op::InitCluster(_) => "InitCluster",
        Op::CreateSession(_) => "CreateSession",
        Op::PatchSession(_) => "PatchSession",
        Op::StopSession(_) => "StopSession",
        Op::HibernateSession(_) => "HibernateSession",
        Op::WakeSession(_) => "WakeSession",
        Op::PlaceQueued(_) => "PlaceQueued",
        Op::SessionOverdue { .. } => "SessionOverdue",
        Op::ReportSession(_) => "ReportSession",
        Op::PutTemplate { .. } => "PutTemplate",
        Op::DeleteTemplate { .. } => "DeleteTemplate",
        Op::CreateUser { .. } => "CreateUser",
        Op::DeleteUser { .. } => "DeleteUser",
        Op::SetPassword { .. } => "SetPassword",
        Op::SetQuota { .. } => "SetQuota",
        Op::CreateToken(_) => "CreateToken",
        Op::DeleteToken { .. } => "DeleteToken",
        Op::RegisterAgent(_) => "RegisterAgent",
        Op::DeleteAgent { .. } => "DeleteAgent",
        Op::SetScheduling { .. } => "SetScheduling",
        Op::AgentConnected(_) => "AgentConnected",
        Op::AgentDisconnected { .. } => "AgentDisconnected",
        Op::AgentCapacity { .. } => "AgentCapacity",
        Op::CreateCommand(_) => "CreateCommand",
        Op::CommandSent { .. } => "CommandSent",
        Op::CommandAcked { .. } => "CommandAcked",
        Op::CommandCompleted { .. } => "CommandCompleted",
        Op::CommandFailed { .. } => "CommandFailed",
        Op::CommandOverdue { .. } => "CommandOverdue",
        Op::CancelCommand { .. } => "CancelCommand",
        Op::RetryCommand { .. } => "RetryCommand",
        Op::AcquireLease { .. } => "AcquireLease",
        Op::ReleaseLease { .. } => "ReleaseLease",
        Op::ForceReleaseLease { .. } => "ForceReleaseLease",
        Op::ExpireLeases { .. } => "ExpireLeases",
        Op::Prune => "Prune",
        Op::Campaign(_) => "Campaign",
        Op::Withdraw { .. } => "Withdraw",
        Op::EndLeases { .. } => "EndLeases",
        Op::ReplicaConnected { .. } => "ReplicaConnected",
        Op::ReleaseAbandoned { .. } => "ReleaseAbandoned",
        Op::ConnectedSince { .. } => "ConnectedSince",
        Op::AdmitMember(_) => "AdmitMember",
        Op::MemberMoved { .. } => "MemberMoved",
        Op::RemoveMember { .. } => "RemoveMember",
        Op::EnrolAgent { .. } => "EnrolAgent",
        Op::RaiseFeatureLevel { .. } => "RaiseFeatureLevel",
        Op::Asked(_) => "Asked",
    }
}

/// How many variants [`name`] knows.
const VARIANTS: usize = 48;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "odd number of hex digits");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

#[test]
fn every_operation_ever_written_is_read() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/requests.txt");
    let mut world = World::new();
    STORY.lines().for_each(|line| drop(world.step(line)));
    world.verify();
    let mut written = std::fs::read_to_string(&file).unwrap_or_default();
    let have: BTreeMap<_, _> = written
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .collect();
    let mut missing = BTreeMap::new();
    for request in world.requests() {
        if !have.contains_key(name(&request)) {
            missing
                .entry(name(&request))
                .or_insert_with(|| hex(&request.encode()));
        }
    }
    if std::env::var_os("REGENT_UPDATE_GOLDEN").is_some() && !missing.is_empty() {
        for (name, hex) in &missing {
            writeln!(written, "{name} {hex}").unwrap();
        }
        std::fs::write(&file, &written).unwrap();
    } else {
        assert!(missing.is_empty(), "no golden line for {:?}", missing.keys());
    }
    let mut names = std::collections::BTreeSet::new();
    for line in written.lines() {
        let (variant, hex) = line.split_once(' ').unwrap();
        let bytes = unhex(hex);
        let request =
            Request::decode(&bytes).unwrap_or_else(|e| panic!("{variant} is no longer read: {e:?}"));
        assert_eq!(
            name(&request),
            variant,
            "what was {variant} is read as something else"
        );
        assert_eq!(request.encode(), bytes, "{variant} is written otherwise");
        names.insert(variant);
    }
    assert_eq!(names.len(), VARIANTS, "only {names:?} have golden lines");
}

#[test]
fn outcomes_come_back_as_they_were() {
    let mut world = World::new();
    for line in STORY.lines() {
        world.step(line);
    }
    for applied in world.outcomes() {
        assert_eq!(&decode_applied(&encode_applied(applied)).unwrap(), applied);
    }
}

#[test]
fn bytes_that_are_none_of_ours_are_refused() {
    assert!(matches!(Request::decode(&[]), Err(CodecError::Truncated)));
    assert!(matches!(
        Request::decode(&[99, 0]),
        Err(CodecError::Version { found: 99 })
    ));
    let mut world = World::new();
    world.step("init");
    for request in world.requests() {
        let bytes = request.encode();
        assert!(
            Request::decode(&bytes[..bytes.len() - 1]).is_err(),
            "cut bytes were taken"
        );
        assert!(
            Request::decode(&[&bytes[..], &[0]].concat()).is_err(),
            "trailing bytes were taken"
        );
    }
}

fn decode(bytes: &[u8], piece: usize) -> Result<State, CodecError> {
    let mut decoder = StateDecoder::new();
    for chunk in bytes.chunks(piece) {
        decoder.push(chunk)?;
    }
    decoder.finish()
}

#[test]
fn a_snapshot_is_taken_whole_or_not_at_all() {
    let mut world = World::new();
    STORY.lines().for_each(|line| drop(world.step(line)));
    let bytes = harness::world::bytes(&world.state);
    for piece in [1, 7, 1000, bytes.len()] {
        let copy = decode(&bytes, piece).unwrap();
        assert_eq!(copy.digest(), world.state.digest());
        assert_eq!(copy.content_digest(), world.state.content_digest());
    }
    // Each check reads the whole: some hundreds of places are enough.
    for end in (0..bytes.len()).step_by(bytes.len() / 200 + 1) {
        assert!(
            decode(&bytes[..end], 4096).is_err(),
            "{end} of {} bytes were taken for the whole",
            bytes.len()
        );
    }
    assert!(
        decode(&[&bytes[..], &[0]].concat(), 4096).is_err(),
        "a trailing byte was taken"
    );
    // The header (revision, time, rolling digest) is guarded by the file around it; what follows by the content digest.
    let header = 1 + 4 + u32::from_le_bytes(bytes[1..5].try_into().unwrap()) as usize;
    for at in (header..bytes.len()).step_by(bytes.len() / 300 + 1) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        assert!(
            decode(&flipped, 4096).is_err(),
            "a flipped bit at {at} was not noticed"
        );
    }
}

#[test]
fn chunks_are_bounded_however_large_a_record_is() {
    let mut world = World::new();
    world.step("init");
    world.step("agent dev");
    let large = format!("template large manifest={}", "x".repeat(60_000));
    for n in 0..20 {
        world.step(&large.replace("large", &format!("large{n}")));
    }
    let chunks: Vec<_> = world.state.encode_chunks().collect();
    assert!(chunks.len() > 4);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk.len() <= regent_state::MAX_CHUNK && !chunk.is_empty())
    );
    world.verify();
}
