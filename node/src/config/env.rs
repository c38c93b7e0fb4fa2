//! The environment as a function, so that tests can have one of their own: changing the real
//! one is not safe in a process with threads.

/// Looks a variable up; `None` if it does not exist or is not UTF-8.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What a variable says in place of the file. An empty one says nothing: it must not wipe what the file says.
pub(crate) fn or_file<T: From<String>>(env: Env<'_>, variable: &str, file: Option<T>) -> Option<T> {
    let given = env(variable).filter(|text| !text.is_empty());
    given.map(T::from).or(file)
}

/// The process's own environment.
pub(crate) fn process_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_counts_before_the_file_and_an_empty_one_not_at_all() {
        let env = |name: &str| match name {
            "SET" => Some("variable".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        let file = || Some("file".to_owned());
        for (variable, given) in [("SET", "variable"), ("EMPTY", "file"), ("UNSET", "file")] {
            assert_eq!(
                or_file(&env, variable, file()).as_deref(),
                Some(given),
                "{variable}"
            );
        }
        assert_eq!(or_file::<String>(&env, "EMPTY", None), None);
    }
}
