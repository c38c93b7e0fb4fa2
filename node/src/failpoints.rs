//! Points at which tests stop or kill this process. Compiled only with the feature `failpoints`, which
//! release packaging refuses.

/// Arms a point: `kill` sends this process SIGKILL there; anything else is an action of the `fail` crate.
///
/// # Errors
/// What is wrong with the action.
pub fn arm(name: &str, action: &str) -> Result<(), String> {
    if action == "kill" {
        return fail::cfg_callback(name, || {
            let own = nix::unistd::Pid::this();
            let _ = nix::sys::signal::kill(own, nix::sys::signal::Signal::SIGKILL);
        });
    }
    fail::cfg(name, action)
}

/// Arms what `HSM_FAILPOINTS` names: `point=action;point=action`.
///
/// # Errors
/// The pair that is wrong.
pub fn arm_from_environment() -> Result<(), String> {
    let Ok(text) = std::env::var("HSM_FAILPOINTS") else {
        return Ok(());
    };
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (name, action) = pair
            .split_once('=')
            .ok_or_else(|| format!("HSM_FAILPOINTS: {pair}: no `=`"))?;
        arm(name, action).map_err(|error| format!("HSM_FAILPOINTS: {pair}: {error}"))?;
    }
    Ok(())
}
