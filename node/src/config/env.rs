//! The environment as a function, so that tests can have one of their own: changing the real
//! one is not safe in a process with threads.

/// Looks a variable up; `None` if it does not exist or is not UTF-8.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The process's own environment.
pub(crate) fn process_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
