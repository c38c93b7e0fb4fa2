//! What a start does about keys of version 1, by what earlier starts have come to, the list and the token.

use super::list::digest_of;

/// What a start does about keys of version 1.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Course<T> {
    /// Nothing: they are adopted.
    Done,
    /// As before, if nobody has given a label twice meanwhile; and a word about the other list.
    Changed(Option<T>),
    /// It ends, to be tried again: half of the keys may be adopted, and nobody would go on with the rest.
    Wait,
    /// There is no list, and the token cannot be looked into.
    Unseen,
    /// There is no list; the token may have keys.
    Unlisted(T),
    /// The list and the token are compared, and what is left is adopted.
    Compare(String, T),
}

/// What earlier starts have come to.
#[derive(Clone, Debug, Default)]
pub(super) struct Before {
    /// The digest of the list that was read to its end.
    pub(super) noted: Option<String>,
    /// There is a cluster.
    pub(super) founded: bool,
    /// A start has begun to adopt, and was cut off.
    pub(super) begun: bool,
}

impl Before {
    /// Whether keys are to be adopted at all: a node that has run without them is not stopped because its token is gone.
    pub(super) fn is_open(&self) -> bool {
        !self.founded || self.begun
    }

    /// Whether the list is read. One that nobody has named is whatever lies in the working directory.
    pub(super) fn reads(&self, named: bool) -> bool {
        let done = self.founded && self.noted.is_some();
        named || self.is_open() && !done
    }
}

/// `token`: if it is open.
pub(super) fn course<T>(before: &Before, list: Option<String>, token: Option<T>) -> Course<T> {
    // Where there is no cluster nothing was adopted, whatever is left in the folder.
    let done = before.noted.as_deref().filter(|_| before.founded);
    match (done, list, token) {
        (Some(digest), Some(list), token) if digest != digest_of(&list) => Course::Changed(token),
        (Some(_), _, _) => Course::Done,
        (None, Some(_), None) if before.is_open() => Course::Wait,
        (None, _, None) => Course::Unseen,
        (None, None, Some(token)) => Course::Unlisted(token),
        (None, Some(list), Some(token)) => Course::Compare(list, token),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::app::StartFailure;

    #[test]
    fn a_start_without_its_token_waits_until_every_key_is_adopted() {
        let list = || Some("rotation: {}".to_owned());
        let noted = || Some(digest_of("rotation: {}"));
        let (open, closed) = (Some(()), None::<()>);
        let before = |noted, founded, begun| Before {
            noted,
            founded,
            begun,
        };
        // The first start, and one after a start that was cut off.
        for earlier in [before(None, false, false), before(None, true, true)] {
            assert!(earlier.reads(false), "the list of the working directory");
            assert_eq!(course(&earlier, list(), closed), Course::Wait);
            let compared = Course::Compare("rotation: {}".to_owned(), ());
            assert_eq!(course(&earlier, list(), open), compared);
            assert_eq!(course(&earlier, None, closed), Course::Unseen);
            assert_eq!(course(&earlier, None, open), Course::Unlisted(()));
        }
        let done = before(noted(), true, false);
        let other = before(Some("00".to_owned()), true, false);
        for token in [open, closed] {
            assert_eq!(course(&done, list(), token), Course::Done);
            assert_eq!(course(&done, None, token), Course::Done);
            assert_eq!(course(&other, list(), token), Course::Changed(token));
        }
        // The note of a cluster that is no more.
        assert_eq!(
            course(&before(noted(), false, false), list(), closed),
            Course::Wait
        );
        assert!(before(noted(), false, true).reads(false));
        let error = StartFailure::Adopting(String::new());
        assert_eq!(error.exit_code(), 70);
    }

    /// It never had to do with version 1, or was told so: a file of that name in its working directory is nobody's list.
    #[test]
    fn a_node_that_runs_reads_no_list_that_nobody_has_named_and_starts_without_its_token() {
        let list = || Some("rotation: {}".to_owned());
        let running = Before {
            founded: true,
            ..Before::default()
        };
        assert!(!running.reads(false) && running.reads(true));
        assert_eq!(course(&running, list(), None::<()>), Course::Unseen);
        assert_eq!(course(&running, None, None::<()>), Course::Unseen);
        let adopted = Before {
            noted: Some(digest_of("")),
            begun: true,
            ..running
        };
        assert!(!adopted.reads(false) && adopted.reads(true));
    }
}
