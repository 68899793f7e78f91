use std::fs;
use std::os::unix::fs::symlink;

use super::*;

struct Place {
    _directory: tempfile::TempDir,
    store: KeyStore,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = KeyStore::at(directory.path().join("gambeson/keys.json"));
        Self { _directory: directory, store }
    }

    fn with_key() -> Self {
        let place = Self::new();
        place.store.create(Generation::FIRST, Answer::default(), None).unwrap();
        place
    }

    fn directory(&self) -> &Path {
        self.store.path().parent().unwrap()
    }

    /// Loading and creating both fail, the message names the file, and what is there stays.
    fn refused(&self, remedy: &str) -> KeyStoreError {
        let before =
            fs::symlink_metadata(self.store.path()).map(|m| (m.ino(), m.len(), m.mtime_nsec()));
        let error = self.store.load().expect_err("loaded");
        let message = error.to_string();
        assert!(message.contains(self.directory().to_str().unwrap()), "{message}");
        assert!(message.contains(remedy), "{message}");
        assert!(self.store.create(Generation::FIRST, Answer::default(), None).is_err(), "created");
        let after =
            fs::symlink_metadata(self.store.path()).map(|m| (m.ino(), m.len(), m.mtime_nsec()));
        assert_eq!(before.ok(), after.ok());
        error
    }
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_created_key_is_loaded_again() {
    let place = Place::new();
    assert!(place.store.load().unwrap().is_none());
    let made = place.store.create(Generation::new(7), Answer::default(), None).unwrap();
    let loaded = place.store.load().unwrap().unwrap();
    assert_eq!(loaded.publics(), made.publics());
    assert_eq!(loaded.newest(), Generation::new(7));
    let (old, new) = (made.private(Generation::new(7)), loaded.private(Generation::new(7)));
    assert_eq!(old.unwrap().as_bytes(), new.unwrap().as_bytes());
    assert_eq!(fs::metadata(place.store.path()).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(place.directory()).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(fs::read_dir(place.directory()).unwrap().count(), 1);
}

#[test]
fn an_existing_key_is_never_replaced() {
    let place = Place::with_key();
    let before = fs::read(place.store.path()).unwrap();
    let error = place.store.create(Generation::new(1), Answer::default(), None).unwrap_err();
    assert!(matches!(error, KeyStoreError::Exists { .. }));
    assert_eq!(fs::read(place.store.path()).unwrap(), before);
}

#[test]
fn a_leftover_of_a_crash_is_no_key_and_no_obstacle() {
    let place = Place::new();
    fs::create_dir(place.directory()).unwrap();
    chmod(place.directory(), 0o700);
    let leftover = place.directory().join(".keys.json.tmp");
    fs::write(&leftover, "half").unwrap();
    assert!(place.store.load().unwrap().is_none());
    place.store.create(Generation::FIRST, Answer::default(), None).unwrap();
    assert!(place.store.load().unwrap().is_some());
    assert!(!leftover.exists());
}

#[test]
fn a_planted_link_in_place_of_the_temporary_is_not_written_through() {
    let place = Place::new();
    fs::create_dir(place.directory()).unwrap();
    chmod(place.directory(), 0o700);
    let elsewhere = place.directory().join("elsewhere");
    symlink(&elsewhere, place.directory().join(".keys.json.tmp")).unwrap();
    place.store.create(Generation::FIRST, Answer::default(), None).unwrap();
    assert!(!elsewhere.exists());
}

#[test]
fn an_empty_file_is_refused() {
    let place = Place::with_key();
    fs::write(place.store.path(), "").unwrap();
    assert!(matches!(place.refused("backup"), KeyStoreError::Empty { .. }));
}

#[test]
fn a_corrupt_file_is_refused() {
    let place = Place::with_key();
    let good = fs::read_to_string(place.store.path()).unwrap();
    for bad in [
        "\0".repeat(120),
        good[..good.len() / 2].to_owned(),
        good.replace("\"schema\":1", "\"schema\":2"),
        good.replace("private-key", "privatekey"),
        good.replace("=\"", "\""),
        "{\"schema\":1,\"keys\":[]}".to_owned(),
        "{\"schema\":1,\"keys\":[{\"generation\":0,\"private-key\":\"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"}]}".to_owned(),
        good.replace(['[', ']'], ""),
        format!("{good}{good}"),
        " ".repeat(LIMIT + 1),
    ] {
        fs::write(place.store.path(), bad).unwrap();
        assert!(matches!(place.refused("corrupt"), KeyStoreError::Corrupt { .. }));
    }
}

#[test]
fn the_same_generation_twice_is_refused() {
    let place = Place::with_key();
    let good = fs::read_to_string(place.store.path()).unwrap();
    let entry = &good[good.find('[').unwrap() + 1..good.find(']').unwrap()];
    fs::write(place.store.path(), good.replace(entry, &format!("{entry},{entry}"))).unwrap();
    place.refused("twice");
}

#[test]
fn a_file_open_to_others_or_closed_to_its_owner_is_refused() {
    for mode in [0o640, 0o604, 0o660, 0o644, 0o601, 0o000, 0o4600] {
        let place = Place::with_key();
        chmod(place.store.path(), mode);
        let error = place.store.load().expect_err("loaded");
        // Without root a file of mode 0000 cannot even be opened.
        let unreadable = matches!(&error, KeyStoreError::Read { .. }) && mode == 0;
        assert!(unreadable || matches!(error, KeyStoreError::Mode { .. }), "{mode:o}: {error}");
        assert!(error.to_string().contains("keys.json"));
    }
    let place = Place::with_key();
    chmod(place.store.path(), 0o400);
    assert!(place.store.load().unwrap().is_some());
}

#[test]
fn a_symlink_is_refused() {
    let place = Place::with_key();
    let target = place.directory().join("target");
    fs::rename(place.store.path(), &target).unwrap();
    symlink(&target, place.store.path()).unwrap();
    assert!(matches!(place.refused("put the file itself"), KeyStoreError::Symlink { .. }));
    fs::remove_file(target).unwrap();
    assert!(matches!(place.refused("put the file itself"), KeyStoreError::Symlink { .. }));
}

#[test]
fn what_is_not_a_file_is_refused() {
    let place = Place::with_key();
    fs::remove_file(place.store.path()).unwrap();
    fs::create_dir(place.store.path()).unwrap();
    assert!(matches!(place.refused("move away"), KeyStoreError::NotAFile { .. }));
    fs::remove_dir(place.store.path()).unwrap();
    nix::unistd::mkfifo(place.store.path(), Mode::from_bits_truncate(0o600)).unwrap();
    assert!(matches!(place.refused("move away"), KeyStoreError::NotAFile { .. }));
}

#[test]
fn a_foreign_file_or_directory_is_refused() {
    let place = Place::with_key();
    let other = Uid::from_raw(Uid::effective().as_raw() + 1);
    let stranger = KeyStore { path: place.store.path().to_owned(), owner: other };
    let error = stranger.load().unwrap_err();
    assert!(matches!(error, KeyStoreError::DirectoryOwner { .. }), "{error}");
    assert!(stranger.create(Generation::FIRST, Answer::default(), None).is_err());
    let file = File::open(place.store.path()).unwrap();
    let error = stranger.check_file(&file).unwrap_err();
    assert!(matches!(error, KeyStoreError::Owner { .. }), "{error}");
}

#[test]
fn an_open_directory_is_refused_once_it_holds_a_key() {
    for mode in [0o755, 0o770, 0o1777, 0o701] {
        let place = Place::with_key();
        chmod(place.directory(), mode);
        assert!(matches!(place.refused("chmod 0700"), KeyStoreError::DirectoryMode { .. }));
    }
}

#[test]
fn a_directory_that_others_can_write_gets_no_key() {
    let place = Place::new();
    fs::create_dir(place.directory()).unwrap();
    chmod(place.directory(), 0o777);
    assert!(matches!(place.refused("chmod 0700"), KeyStoreError::DirectoryMode { .. }));
}

#[test]
fn a_directory_that_others_can_only_read_is_closed_for_the_first_key() {
    let place = Place::new();
    fs::create_dir(place.directory()).unwrap();
    chmod(place.directory(), 0o755);
    assert!(place.store.load().unwrap().is_none());
    place.store.create(Generation::FIRST, Answer::default(), None).unwrap();
    assert_eq!(fs::metadata(place.directory()).unwrap().mode() & 0o7777, 0o700);
    assert!(place.store.load().unwrap().is_some());
}

#[test]
fn a_file_or_link_in_place_of_the_directory_is_refused() {
    let place = Place::new();
    fs::write(place.directory(), "").unwrap();
    assert!(matches!(place.refused("not a directory"), KeyStoreError::NotADirectory { .. }));
    fs::remove_file(place.directory()).unwrap();
    symlink(std::env::temp_dir(), place.directory()).unwrap();
    assert!(matches!(place.refused("not a directory"), KeyStoreError::NotADirectory { .. }));
}

#[test]
fn a_path_without_a_file_name_is_refused() {
    assert!(matches!(KeyStore::at("/").load(), Err(KeyStoreError::NoFileName { .. })));
}

#[test]
fn a_failed_write_leaves_nothing_behind() {
    let place = Place::new();
    fs::create_dir(place.directory()).unwrap();
    chmod(place.directory(), 0o700);
    // A directory in place of the temporary cannot be removed as a file is.
    let obstacle = place.directory().join(".keys.json.tmp");
    fs::create_dir(&obstacle).unwrap();
    let error = place.store.create(Generation::FIRST, Answer::default(), None).unwrap_err();
    assert!(matches!(error, KeyStoreError::Write { .. }), "{error}");
    assert!(place.store.load().unwrap().is_none());
}

fn request(text: &str) -> Answer {
    Answer { request: Some(text.to_owned()), revoke: false }
}

#[test]
fn a_rotation_has_two_keys_on_disk_and_leaves_nothing_of_the_old_one() {
    let place = Place::new();
    let mut ring = place.store.create(Generation::new(6), request("before"), None).unwrap();
    let old = ring.private(Generation::new(6)).unwrap().as_bytes().to_owned();
    place.store.add_next(&mut ring, request("now"), None).unwrap();
    for ring in [&ring, &place.store.load().unwrap().unwrap()] {
        assert_eq!(ring.publics().into_keys().map(Generation::number).collect::<Vec<_>>(), [6, 7]);
        assert_eq!((ring.newest().number(), ring.answer()), (7, &request("now")));
        assert_eq!(ring.private(Generation::new(6)).unwrap().as_bytes(), &old);
    }
    // What a copy of the old file by another name would still hold.
    let link = place.store.path().with_extension("link");
    std::fs::hard_link(place.store.path(), &link).unwrap();
    place.store.retire_older(&mut ring).unwrap();
    assert!(std::fs::read(&link).unwrap().iter().all(|byte| *byte == 0));
    std::fs::remove_file(link).unwrap();
    for ring in [&ring, &place.store.load().unwrap().unwrap()] {
        assert_eq!(ring.publics().into_keys().map(Generation::number).collect::<Vec<_>>(), [7]);
        assert_eq!(ring.answer(), &request("now"));
    }
    // Two at most, whatever happens.
    place.store.add_next(&mut ring, Answer::default(), None).unwrap();
    place.store.add_next(&mut ring, Answer::default(), None).unwrap();
    assert_eq!(place.store.load().unwrap().unwrap().publics().len(), 2);
}

#[test]
fn a_key_that_cannot_be_written_is_not_used() {
    let place = Place::new();
    let mut ring = place.store.create(Generation::FIRST, Answer::default(), None).unwrap();
    let before = ring.publics();
    let elsewhere = KeyStore::at("/proc/gambeson/keys.json");
    assert!(elsewhere.add_next(&mut ring, request("now"), None).is_err());
    assert_eq!((&ring.publics(), ring.answer()), (&before, &Answer::default()));
}

#[test]
fn a_key_is_bound_to_a_secret_and_the_one_before_is_kept_until_it_is_forgotten() {
    let place = Place::new();
    let secret = |byte: char| ClusterSecret::parse(&format!("{}=", byte.to_string().repeat(43)));
    let [one, two, three] = ['A', 'E', 'I'].map(|byte| secret(byte).unwrap());
    let mut ring = place.store.create(Generation::FIRST, Answer::default(), None).unwrap();
    for (secret, known) in [
        (&one, vec![&one]),
        (&two, vec![&one, &two]),
        (&two, vec![&one, &two]),
        (&three, vec![&two, &three]),
    ] {
        place.store.add_next(&mut ring, Answer::default(), Some(secret.clone())).unwrap();
        place.store.retire_older(&mut ring).unwrap();
        for ring in [&ring, &place.store.load().unwrap().unwrap()] {
            assert_eq!(ring.secrets().iter().collect::<Vec<_>>(), known);
            assert_eq!(ring.secret_ids().values().collect::<Vec<_>>(), [&secret.id()]);
        }
    }
    place.store.forget_older_secrets(&mut ring).unwrap();
    assert_eq!(place.store.load().unwrap().unwrap().secrets(), &Secrets::new([three]));
}
