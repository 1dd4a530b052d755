// The status line: asks /health every five seconds, backs off while nobody answers, recovers by itself.

import { word } from './words.js';

const EVERY_MS = 5000;
const LONGEST_MS = 30000;

// `onUp` is called each time the server becomes ready after not having been so.
export function watchHealth({ dot, text, retry }, onUp) {
  let health = null;
  let failures = 0;
  let nextAt = 0;
  let timer = 0;
  let wasUp = false;

  async function ask() {
    clearTimeout(timer);
    try {
      const response = await fetch('/health', { cache: 'no-store', signal: AbortSignal.timeout(4000) });
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      health = await response.json();
      failures = 0;
    } catch {
      health = null;
      failures += 1;
    }
    const isUp = health?.status === 'ok';
    if (isUp && !wasUp) onUp();
    wasUp = isUp;
    const pause = failures === 0 ? EVERY_MS : Math.min(LONGEST_MS, 1000 * 2 ** (failures - 1));
    nextAt = Date.now() + pause;
    timer = setTimeout(ask, pause);
    show();
  }

  function show() {
    const [kind, words] = describe();
    dot.dataset.kind = kind;
    // Written only when it changed: screen readers read every change.
    if (text.textContent !== words) text.textContent = words;
    retry.hidden = kind !== 'down';
  }

  function describe() {
    if (health === null) {
      if (failures === 0) return ['loading', word('connecting')];
      const seconds = Math.max(1, Math.round((nextAt - Date.now()) / 1000));
      return ['down', word('unreachable', seconds)];
    }
    if (health.status === 'loading') return ['loading', word('loading')];
    if (health.status !== 'ok') return ['down', word('stopped')];
    const { queue } = health;
    return queue.waiting > 0 ? ['busy', word('busy', queue)] : ['ok', word('ok')];
  }

  retry.addEventListener('click', ask);
  ask();
  return { show, isUp: () => wasUp };
}
