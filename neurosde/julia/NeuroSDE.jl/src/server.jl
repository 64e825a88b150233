# The worker: answers requests on a socket, working on memory that both processes map.
#
# A request is 96 little-endian 64-bit words; places in memory are byte offsets, −1 for none. The reply is two words:
# the status (0 done, 1 error, 2 interrupted) and the length of the message at MESSAGE_OFFSET. Word 0 of the memory is
# the stop flag. The other side is neurosde/julia/worker.py.

const REQUEST_WORDS = 96
const MESSAGE_OFFSET = 64
const MESSAGE_BYTES = 4032
const OP_DESCRIBE, OP_FORWARD, OP_ADJOINT, OP_PEAK = 0, 1, 2, 3
const DONE, FAILED, INTERRUPTED = 0, 1, 2
const SPIN_NANOSECONDS = 1_000_000  # how long to look for the next request before sleeping

"Takes a request's words in turn."
mutable struct Reader
    words::Vector{Int64}
    next::Int
    memory::Ptr{UInt8}
end
@inline word!(r::Reader) = (r.next += 1; r.words[r.next-1])
@inline function pointer!(r::Reader, ::Type{T}) where {T}
    offset = word!(r)
    offset < 0 ? Ptr{T}(C_NULL) : Ptr{T}(r.memory + offset)
end
@inline function field!(r::Reader, ::Type{T}) where {T}
    p = pointer!(r, T)
    Field{T}(p, word!(r), word!(r), word!(r), word!(r))
end

function answer!(r::Reader, workspaces, socket::Cint)
    operation = word!(r)
    operation == OP_DESCRIBE && return DONE, description()
    operation == OP_PEAK && return DONE, string(peak_flops(word!(r)))
    wide, phi = word!(r), ACTIVATIONS[word!(r)+1]
    done = wide == 8 ? compute!(r, workspaces[2], operation, phi, socket) : compute!(r, workspaces[1], operation, phi,
        socket)
    done ? DONE : INTERRUPTED, ""
end

function compute!(r::Reader, workspaces::Vector{Workspace{T}}, operation::Int64, phi::Activation,
        socket::Cint) where {T}
    M, K, N, steps, threads = word!(r), word!(r), word!(r), word!(r), word!(r)
    weights = pointer!(r, T)
    state, decay, input, sigma, increments = field!(r, T), field!(r, T), field!(r, T), field!(r, T), field!(r, T)
    noise = Noise{T}(increments, pointer!(r, UInt64), pointer!(r, Int64), T(reinterpret(Float64, word!(r))))
    p = Problem(phi, M, K, N, steps, weights, state, decay, input, sigma, noise, Watch(Ptr{Int64}(r.memory), socket))
    operation == OP_FORWARD && return forward!(workspaces, p, field!(r, T), field!(r, T), threads)
    x, h, gx, gh = field!(r, T), field!(r, T), field!(r, T), field!(r, T)
    out = Cotangents{T}(word!(r), field!(r, T), pointer!(r, T), field!(r, T), field!(r, T), word!(r), field!(r, T),
        field!(r, T))
    adjoint!(workspaces, p, x, h, gx, gh, out, threads)
end

description() = join(("version=$VERSION", "threads=$(Threads.nthreads())", "cpu=$(Sys.CPU_NAME)",
                      "llvm=$(Base.libllvm_version)", "lanes_bits=$(8REGISTER_BYTES)"), "\n")

"Receive `bytes` bytes; false if the other side has hung up."
function receive!(buffer::Ptr{UInt8}, bytes::Int, socket::Cint)
    got = 0
    spin_until = time_ns() + SPIN_NANOSECONDS
    while got < bytes
        n = ccall(:recv, Cssize_t, (Cint, Ptr{UInt8}, Csize_t, Cint), socket, buffer + got, bytes - got, MSG_DONTWAIT)
        if n > 0
            got += n
        elseif n == 0 || !(Libc.errno() in (Libc.EAGAIN, Libc.EINTR))
            return false
        elseif time_ns() > spin_until
            poll(socket, POLLIN, -1)
        end
    end
    true
end
const MSG_DONTWAIT = Sys.isapple() ? 0x80 : 0x40
const MSG_NOSIGNAL = Sys.isapple() ? 0x80000 : 0x4000

function send!(words::Vector{Int64}, socket::Cint)
    GC.@preserve words begin
        ccall(:send, Cssize_t, (Cint, Ptr{Cvoid}, Csize_t, Cint), socket, pointer(words), sizeof(words),
            MSG_NOSIGNAL) == sizeof(words)
    end
end

"""
    serve(socket, memory, bytes)

Answer requests on a socket (a file descriptor) about the shared memory behind the file descriptor `memory`, until the
other side hangs up.
"""
function serve(socket::Integer, memory::Integer, bytes::Integer)
    socket = Cint(socket)
    MAP_FAILED, READ_WRITE, SHARED = Ptr{UInt8}(typemax(UInt)), 3, 1
    base = ccall(:mmap, Ptr{UInt8}, (Ptr{Cvoid}, Csize_t, Cint, Cint, Cint, Int64), C_NULL, bytes, READ_WRITE, SHARED,
        memory, 0)
    base == MAP_FAILED && error("cannot map $bytes bytes of shared memory: $(Libc.strerror())")
    threads = Threads.nthreads()
    workspaces = ([Workspace{Float32}() for _ in 1:threads], [Workspace{Float64}() for _ in 1:threads])
    reader = Reader(zeros(Int64, REQUEST_WORDS), 1, base)
    reply = zeros(Int64, 2)
    while GC.@preserve reader receive!(Ptr{UInt8}(pointer(reader.words)), 8REQUEST_WORDS, socket)
        reader.next = 1
        status, message = try
            answer!(reader, workspaces, socket)
        catch problem
            FAILED, sprint(showerror, problem)
        end
        count = min(sizeof(message), MESSAGE_BYTES)
        GC.@preserve message unsafe_copyto!(base + MESSAGE_OFFSET, pointer(message), count)
        reply[1], reply[2] = status, count
        send!(reply, socket) || break
    end
    nothing
end
