// The chat page: the conversation as data, the log drawn from it, and what the buttons do to it.

import { RequestError, chat, getJson, setKey } from './api.js';
import { createMovie } from './movie.js';
import { watchHealth } from './status.js';
import { language, localized, modelSentence, switchLanguage, translatePage, word } from './words.js';

const MAX_TOKENS = 512;
const STORE = 'cyrene.conversation';
// Perplexities between which a line is shown in full, and beyond which it is at its palest.
const SHADE = { sure: 1, from: 2, to: 8, strange: 40, palest: 0.55 };

const $ = (id) => document.getElementById(id);

// messages: {role: 'user', content} or {role: 'assistant', versions: [{content, lines, finish}], at}
const state = {
  info: null,
  messages: loadConversation(),
  busy: null,
  editing: false,
  error: null,
};

const health = watchHealth({ dot: $('dot'), text: $('status-text'), retry: $('retry') }, loadInfo);
const movie = createMovie(
  {
    stage: $('stage'), plate: $('plate'), line: $('line'), more: $('more'), next: $('next'),
    auto: $('auto'), backlog: $('backlog'), hide: $('hide'), leave: $('leave'), toggle: $('movie'),
  },
  movieSource,
);

// --- what is known of the server

async function loadInfo() {
  try {
    state.info = await getJson('/ui/info');
  } catch (error) {
    if (error.status === 401) askForKey();
    return;
  }
  drawProfiles();
  draw();
}

function drawProfiles() {
  const select = $('profile');
  const wanted = sessionStorage.getItem('cyrene.profile') ?? state.info.active_profile;
  select.replaceChildren(...state.info.profiles.map((profile) => {
    const option = document.createElement('option');
    option.value = profile.name;
    option.textContent = `${profile.name}: T ${short(profile.temperature)}, top-p ${short(profile.top_p)}, `
      + `top-k ${profile.top_k}, presence ${short(profile.presence_penalty)}`;
    option.selected = profile.name === wanted;
    return option;
  }));
}

function askForKey() {
  const dialog = $('key-dialog');
  if (!dialog.open) dialog.showModal();
}

// --- the conversation as data

function current(message) {
  return message.versions[message.at];
}

function lastOf(role) {
  return state.messages.findLast((message) => message.role === role);
}

// The page's language decides which system prompt of the training she hears; without one the server's own holds.
function systemMessage() {
  const content = localized(state.info?.system_prompts);
  return content ? { role: 'system', content } : null;
}

// What stands before the conversation: the system prompt, and the greeting, which was shown and so was said.
function opening() {
  const greeting = localized(state.info?.greeting);
  const said = greeting ? [{ role: 'assistant', content: greeting }] : [];
  const system = systemMessage();
  return system ? [system, ...said] : said;
}

// What the model reads.
function history() {
  return state.messages.map((message) => ({
    role: message.role,
    content: message.role === 'user' ? message.content : current(message).content,
  }));
}

function lineTexts(content) {
  return content.split('\n').map((text) => text.trimEnd()).filter((text) => text.trim() !== '');
}

function loadConversation() {
  try {
    return JSON.parse(sessionStorage.getItem(STORE)) ?? [];
  } catch {
    return [];
  }
}

function saveConversation() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(state.messages));
  } catch {
    // A full or forbidden store costs the conversation at a reload, no more.
  }
}

// Removes the last message of the user and what followed; gives its text.
function takeBack() {
  const index = state.messages.findLastIndex((message) => message.role === 'user');
  if (index < 0) return null;
  const [message] = state.messages.splice(index);
  state.error = null;
  return message.content;
}

// --- replies

async function send(text) {
  if (state.editing) takeBack();
  setEditing(false);
  state.messages.push({ role: 'user', content: text });
  await reply({ role: 'assistant', versions: [], at: 0 });
}

// Streams a new version of `message`, which goes to the end of the conversation if it is not there.
async function reply(message) {
  const index = state.messages.indexOf(message);
  const said = index < 0 ? history() : history().slice(0, index);
  const messages = [...opening(), ...said];
  const version = { content: '', lines: [], finish: null };
  message.versions.push(version);
  message.at = message.versions.length - 1;
  if (index < 0) state.messages.push(message);
  state.error = null;
  state.busy = new AbortController();
  draw();
  scrollToEnd(true);
  try {
    const body = { messages, profile: $('profile').value || undefined, max_tokens: MAX_TOKENS };
    for await (const event of chat(body, state.busy.signal)) {
      if (event.type === 'text') version.content += event.text;
      if (event.type === 'line') {
        version.lines.push({ text: event.line.text, ppl: event.line.ppl });
        $('live').textContent = event.line.text;
      }
      if (event.type === 'finish') version.finish = event.reason;
      drawLast();
    }
  } catch (error) {
    if (error.name !== 'AbortError') report(error);
    version.finish = 'stopped';
  } finally {
    state.busy = null;
    if (version.content.trim() === '' && version.finish === 'stopped') dropVersion(message, version);
    saveConversation();
    draw();
  }
}

function dropVersion(message, version) {
  message.versions.splice(message.versions.indexOf(version), 1);
  message.at = Math.max(0, message.versions.length - 1);
  if (message.versions.length === 0) state.messages.splice(state.messages.indexOf(message), 1);
}

function report(error) {
  if (error instanceof RequestError && error.status === 401) askForKey();
  const text = error instanceof RequestError ? error.message : word('unreachable', 5);
  state.error = text;
}

// Another reply to the last message.
function swipe() {
  const last = state.messages.at(-1);
  if (last?.role === 'assistant') return reply(last);
  if (last?.role === 'user') return reply({ role: 'assistant', versions: [], at: 0 });
}

// --- drawing

function draw() {
  translatePage();
  health.show();
  const name = characterName();
  $('name').textContent = name;
  document.title = name;
  if (state.info) $('note').textContent = modelSentence(state.info);
  $('language').textContent = language() === 'zh' ? 'EN' : '中';
  $('editing').hidden = !state.editing;
  document.body.classList.toggle('shaded', $('shade').checked);

  const entries = [];
  const greeting = localized(state.info?.greeting);
  if (greeting) entries.push(entry('assistant', name, lineTexts(greeting), []));
  state.messages.forEach((message, index) => entries.push(drawMessage(message, index)));
  if (state.error !== null) entries.push(drawError());
  if (entries.length === 0) entries.push(hint(word('empty')));
  $('log').replaceChildren(...entries);
  drawButtons();
  scrollToEnd(false);
  movie.update();
}

function drawMessage(message, index) {
  if (message.role === 'user') return entry('user', word('you'), lineTexts(message.content), []);
  const version = current(message);
  const item = entry('assistant', characterName(), lineTexts(version.content), version.lines);
  const isLast = index === state.messages.length - 1;
  if (isLast) {
    item.id = 'last';
    item.setAttribute('aria-busy', String(state.busy !== null));
  }
  if (isLast && message.versions.length > 1 && !state.busy) item.append(versionPicker(message));
  return item;
}

// Only the reply that is growing: redrawing all for every token would be slow and lose selections.
function drawLast() {
  const version = current(state.messages.at(-1));
  const body = $('last')?.querySelector('.body');
  if (body) fill(body, lineTexts(version.content), version.lines);
  scrollToEnd(false);
  movie.update();
}

function entry(role, name, texts, lines) {
  const item = document.createElement('li');
  item.className = `entry ${role}`;
  const plate = document.createElement('p');
  plate.className = 'plate';
  plate.textContent = name;
  const body = document.createElement('div');
  body.className = 'body';
  fill(body, texts, lines);
  item.append(plate, body);
  return item;
}

function fill(body, texts, lines) {
  const shown = texts.length > 0 ? texts : [state.busy ? '…' : word('silent')];
  while (body.children.length > shown.length) body.lastElementChild.remove();
  shown.forEach((text, index) => {
    let line = body.children[index];
    if (!line) {
      line = document.createElement('p');
      line.className = 'line';
      body.append(line);
    }
    if (line.textContent !== text) line.textContent = text;
    const ppl = lines[index]?.ppl;
    if (ppl !== undefined && line.dataset.ppl !== String(ppl)) {
      line.dataset.ppl = String(ppl);
      line.title = word('expected', ppl.toPrecision(3));
      line.style.setProperty('--shade', opacity(ppl).toFixed(2));
    }
  });
}

// Two-sided: too sure is as telling as too surprised. Logarithmic, as perplexity is.
function opacity(ppl) {
  const { sure, from, to, strange, palest } = SHADE;
  let share = 1;
  if (ppl < from) share = Math.log(ppl / sure) / Math.log(from / sure);
  if (ppl > to) share = 1 - Math.log(ppl / to) / Math.log(strange / to);
  return palest + (1 - palest) * Math.min(1, Math.max(0, share));
}

function versionPicker(message) {
  const picker = document.createElement('p');
  picker.className = 'versions';
  const step = (label, sign, by) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = sign;
    button.setAttribute('aria-label', label);
    button.disabled = message.at + by < 0 || message.at + by >= message.versions.length;
    button.addEventListener('click', () => {
      message.at += by;
      saveConversation();
      draw();
    });
    return button;
  };
  const count = document.createElement('span');
  count.textContent = ` ${message.at + 1} / ${message.versions.length} `;
  picker.append(step(word('previous'), '‹', -1), count, step(word('following'), '›', 1));
  return picker;
}

function drawError() {
  const item = hint(word('failed', state.error));
  item.className = 'entry error';
  item.setAttribute('role', 'alert');
  const again = document.createElement('button');
  again.type = 'button';
  again.textContent = word('again');
  again.addEventListener('click', swipe);
  item.append(again);
  return item;
}

function hint(text) {
  const item = document.createElement('li');
  item.className = 'entry hint';
  item.textContent = text;
  return item;
}

function drawButtons() {
  const isBusy = state.busy !== null;
  const hasUser = lastOf('user') !== undefined;
  $('send').hidden = isBusy;
  $('stop').hidden = !isBusy;
  $('swipe').disabled = isBusy || !hasUser;
  $('undo').disabled = isBusy || !hasUser;
  $('edit').disabled = isBusy || !hasUser;
  $('copy').disabled = lastOf('assistant') === undefined;
  $('export').disabled = state.messages.length === 0;
  $('clear').disabled = isBusy || state.messages.length === 0;
}

function scrollToEnd(always) {
  const log = $('log');
  const isNearEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 160;
  if (always || isNearEnd) log.scrollTop = log.scrollHeight;
}

function characterName() {
  return localized(state.info?.names, state.info?.name || 'cyrene');
}

// What movie mode reads: the last reply, without the line that is still growing.
function movieSource() {
  const message = state.messages.at(-1);
  if (message?.role !== 'assistant') {
    const lines = lineTexts(localized(state.info?.greeting));
    return { key: 'greeting', name: characterName(), lines };
  }
  const version = current(message);
  const lines = lineTexts(version.content);
  if (state.busy && !version.content.endsWith('\n')) lines.pop();
  return { key: `${state.messages.length}:${message.at}`, name: characterName(), lines };
}

function short(value) {
  return String(Number(value.toPrecision(3)));
}

// --- buttons and keys

function setEditing(on) {
  state.editing = on;
  $('editing').hidden = !on;
}

function fitInput() {
  const input = $('input');
  input.style.height = 'auto';
  input.style.height = `${Math.min(input.scrollHeight, 160)}px`;
}

function setInput(text) {
  $('input').value = text;
  fitInput();
  $('input').focus();
}

function exportConversation() {
  const messages = state.messages.map((message) => (message.role === 'user'
    ? { role: 'user', content: message.content }
    : { role: 'assistant', content: current(message).content, lines: current(message).lines }));
  const text = JSON.stringify({
    model: state.info?.model ?? null,
    profile: $('profile').value,
    system_prompt: state.info?.system_prompt ?? null,
    exported_at: new Date().toISOString(),
    messages,
  }, null, 2);
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
  link.download = 'conversation.json';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function copyReply() {
  const text = current(lastOf('assistant')).content;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Clipboards are closed to pages without TLS: select a copy of the text and use the old command.
    const box = document.createElement('textarea');
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand('copy');
    box.remove();
  }
  $('live').textContent = word('copied');
}

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = $('input').value.trim();
  if (text === '' || state.busy) return;
  setInput('');
  send(text);
});
$('input').addEventListener('input', fitInput);
$('input').addEventListener('keydown', (event) => {
  // While an input method is composing, Enter belongs to it.
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if ($('input').value.trim() === '') return;
    event.stopPropagation();
    $('form').requestSubmit();
  }
  if (event.key === 'Escape' && state.editing) {
    setEditing(false);
    setInput('');
    event.stopPropagation();
  }
});
$('stop').addEventListener('click', () => state.busy?.abort());
$('swipe').addEventListener('click', swipe);
$('undo').addEventListener('click', () => {
  const text = takeBack();
  if (text !== null && $('input').value === '') setInput(text);
  saveConversation();
  draw();
});
$('edit').addEventListener('click', () => {
  setEditing(true);
  setInput(lastOf('user').content);
});
$('copy').addEventListener('click', copyReply);
$('export').addEventListener('click', exportConversation);
$('clear').addEventListener('click', () => {
  if (!window.confirm(word('clearQuestion'))) return;
  state.messages = [];
  state.error = null;
  setEditing(false);
  saveConversation();
  draw();
});
$('profile').addEventListener('change', () => sessionStorage.setItem('cyrene.profile', $('profile').value));
$('shade').addEventListener('change', () => {
  localStorage.setItem('cyrene.shade', $('shade').checked ? 'on' : 'off');
  draw();
});
$('language').addEventListener('click', () => {
  switchLanguage();
  draw();
});
$('key-form').addEventListener('submit', () => {
  setKey($('key').value.trim());
  $('key').value = '';
  loadInfo();
});

$('shade').checked = localStorage.getItem('cyrene.shade') !== 'off';
draw();
$('input').focus();
