// Movie mode: the log is hidden, one line stands alone, a click or a key brings the next.

// `source` gives {name, lines, done} of what is being read; `elements` are the stage's parts.
export function createMovie(elements, source) {
  const { stage, plate, line, more, next, auto, backlog, hide, leave, toggle } = elements;
  let at = 0;
  let timer = 0;
  let isAuto = false;
  let reading = null;

  function isOn() {
    return !stage.hidden;
  }

  function enter() {
    stage.hidden = false;
    document.body.classList.add('movie');
    toggle.setAttribute('aria-pressed', 'true');
    update();
    next.focus();
  }

  function exit() {
    stage.hidden = true;
    document.body.classList.remove('movie', 'bare', 'backlog');
    backlog.setAttribute('aria-pressed', 'false');
    toggle.setAttribute('aria-pressed', 'false');
    setAuto(false);
    toggle.focus();
  }

  // Called whenever what is being read grew or was replaced.
  function update() {
    if (!isOn()) return;
    const current = source();
    if (current.key !== reading) {
      reading = current.key;
      at = 0;
    }
    at = Math.max(0, Math.min(at, current.lines.length - 1));
    plate.textContent = current.name;
    const words = current.lines[at] ?? '…';
    if (line.textContent !== words) line.textContent = words;
    more.classList.toggle('waiting', at + 1 < current.lines.length);
    if (isAuto) schedule();
  }

  function proceed() {
    if (document.body.classList.contains('bare')) {
      document.body.classList.remove('bare');
      return;
    }
    if (at + 1 < source().lines.length) at += 1;
    update();
  }

  function setAuto(on) {
    isAuto = on;
    auto.setAttribute('aria-pressed', String(on));
    clearTimeout(timer);
    timer = 0;
    if (on) schedule();
  }

  // A line stays as long as it takes to read it.
  function schedule() {
    if (timer !== 0 || at + 1 >= source().lines.length) return;
    timer = setTimeout(() => {
      timer = 0;
      if (isAuto && isOn()) proceed();
    }, 900 + 55 * line.textContent.length);
  }

  function toggleBacklog() {
    const on = document.body.classList.toggle('backlog');
    backlog.setAttribute('aria-pressed', String(on));
  }

  function toggleBare() {
    document.body.classList.toggle('bare');
  }

  function onKey(event) {
    if (!isOn() || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const target = event.target;
    if (event.key === 'Escape') {
      if (target.closest?.('dialog')) return;
      exit();
    } else if (target.matches?.('textarea, input, select')) {
      // Enter in an empty message box goes on reading; everything else there is typing.
      if (event.key !== 'Enter' || !target.matches('textarea') || target.value !== '') return;
      proceed();
    } else if (event.key === ' ' || event.key === 'Enter') {
      // A focused button is pressed by these keys anyway.
      if (target.matches?.('button')) return;
      proceed();
    } else {
      const action = { a: () => setAuto(!isAuto), l: toggleBacklog, h: toggleBare }[event.key.toLowerCase()];
      if (!action) return;
      action();
    }
    event.preventDefault();
  }

  next.addEventListener('click', proceed);
  auto.addEventListener('click', () => setAuto(!isAuto));
  backlog.addEventListener('click', toggleBacklog);
  hide.addEventListener('click', toggleBare);
  leave.addEventListener('click', exit);
  toggle.addEventListener('click', () => (isOn() ? exit() : enter()));
  document.addEventListener('keydown', onKey);
  // With the interface hidden, a click anywhere brings it back.
  document.addEventListener('click', (event) => {
    if (document.body.classList.contains('bare') && !stage.contains(event.target)) toggleBare();
  });
  return { update, isOn };
}
