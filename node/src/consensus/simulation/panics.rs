//! Panics of simulated tasks. tokio keeps them with the task, which often nobody waits for; all run on the thread of their
//! simulation, so they are told there.

use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    static SAID: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// From now on panics are kept, each for its thread.
pub(super) fn watch() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // Not where the thread is ending, nor inside another one.
            let _ = SAID.try_with(|said| {
                if let Ok(mut said) = said.try_borrow_mut() {
                    said.push(panic.to_string());
                }
            });
            before(panic);
        }));
    });
    said();
}

/// What has panicked on this thread since it was last asked.
pub(super) fn said() -> Vec<String> {
    SAID.take()
}
