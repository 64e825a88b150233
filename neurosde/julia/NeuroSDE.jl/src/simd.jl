# Short vectors: tuples of VecElements that LLVM keeps in registers.
#
# Only what the kernels need. Plain operations are single-string llvmcalls and intrinsics go through ccall, the two
# forms that mean the same from Julia 1.5 to 1.12; memory is reached through `Ptr{NTuple}`, since typed LLVM pointers are
# gone from Julia 1.12 on.

const Vec{W,T} = NTuple{W,VecElement{T}}
const Real32or64 = Union{Float32,Float64}

_llvm(::Type{Float32}) = "float"
_llvm(::Type{Float64}) = "double"
_llvm(::Type{Int32}) = "i32"
_llvm(::Type{Int64}) = "i64"
_llvm(::Type{UInt64}) = "i64"
_llvm(W::Int, T::Type) = "<$W x $(_llvm(T))>"
_suffix(::Type{Float32}) = "f32"
_suffix(::Type{Float64}) = "f64"

"Signed integer type as wide as `T`."
intof(::Type{Float32}) = Int32
intof(::Type{Float64}) = Int64

"Width in bytes of a SIMD register of this machine."
function register_bytes()
    flags = try
        Sys.islinux() ? read("/proc/cpuinfo", String) : ""
    catch
        ""
    end
    occursin("avx512dq", flags) && return 64
    Sys.ARCH === :x86_64 ? 32 : 16
end

const REGISTER_BYTES = register_bytes()

"Number of architectural vector registers: bounds the accumulators of a tile."
const NUM_REGISTERS = REGISTER_BYTES == 32 ? 16 : 32

"Lanes of a vector of `T`."
lanes(::Type{T}) where {T} = REGISTER_BYTES ÷ sizeof(T)

@inline vload(::Type{Vec{W,T}}, p::Ptr{T}) where {W,T} = unsafe_load(Ptr{Vec{W,T}}(p))
@inline vstore!(p::Ptr{T}, v::Vec{W,T}) where {W,T} = (unsafe_store!(Ptr{Vec{W,T}}(p), v); nothing)

# A store past the caches, for what is written once and not read soon; `p` must be aligned to the vector's size. Julia 1.12
# has no typed pointers in llvmcall any more; there a plain store does.
@static if VERSION < v"1.12-"
    @generated function vstream!(p::Ptr{T}, v::Vec{W,T}) where {W,T<:Real32or64}
        vector = _llvm(W, T)
        ir = """
        %3 = inttoptr i64 %0 to $vector*
        store $vector %1, $vector* %3, align $(W * sizeof(T)), !nontemporal !{i32 1}
        ret void"""
        :($(Expr(:meta, :inline)); Base.llvmcall($ir, Cvoid, Tuple{Ptr{$T},Vec{$W,$T}}, p, v))
    end
else
    @inline vstream!(p::Ptr, v::Vec) = vstore!(p, v)
end

@generated function splat(::Type{Vec{W,T}}, x::T) where {W,T}
    t, v = _llvm(T), _llvm(W, T)
    ir = """
    %2 = insertelement $v undef, $t %0, i32 0
    %3 = shufflevector $v %2, $v undef, <$W x i32> zeroinitializer
    ret $v %3"""
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{$T}, x))
end

for (name, op) in ((:vadd, "fadd"), (:vsub, "fsub"), (:vmul, "fmul"), (:vdiv, "fdiv"))
    @eval @generated function $name(a::Vec{W,T}, b::Vec{W,T}) where {W,T<:Real32or64}
        v = _llvm(W, T)
        ir = "%3 = " * $op * " $v %0, %1\nret $v %3"
        :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$T},Vec{$W,$T}}, a, b))
    end
end

for (name, op) in ((:vadd, "add"), (:vxor, "xor"), (:vand, "and"))
    @eval @generated function $name(a::Vec{W,T}, b::Vec{W,T}) where {W,T<:Integer}
        v = _llvm(W, T)
        ir = "%3 = " * $op * " $v %0, %1\nret $v %3"
        :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$T},Vec{$W,$T}}, a, b))
    end
end

for (name, op) in ((:vshl, "shl"), (:vlshr, "lshr"), (:vashr, "ashr"))
    @eval @generated function $name(a::Vec{W,T}, ::Val{S}) where {W,T<:Integer,S}
        v, t = _llvm(W, T), _llvm(T)
        amount = "<" * join(("$t $S" for _ in 1:W), ", ") * ">"
        ir = "%2 = " * $op * " $v %0, $amount\nret $v %2"
        :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$T}}, a))
    end
end

"a·b + c with one rounding."
@generated function vfma(a::Vec{W,T}, b::Vec{W,T}, c::Vec{W,T}) where {W,T<:Real32or64}
    V, name = Vec{W,T}, "llvm.fma.v$W$(_suffix(T))"
    :($(Expr(:meta, :inline)); ccall($name, llvmcall, $V, ($V, $V, $V), a, b, c))
end

for (name, intrinsic) in ((:vsqrt, "sqrt"), (:vabs, "fabs"))
    @eval @generated function $name(a::Vec{W,T}) where {W,T<:Real32or64}
        V, name = Vec{W,T}, "llvm." * $intrinsic * ".v$W$(_suffix(T))"
        :($(Expr(:meta, :inline)); ccall($name, llvmcall, $V, ($V,), a))
    end
end

"Magnitude of `a` with the sign of `b`."
@generated function vcopysign(a::Vec{W,T}, b::Vec{W,T}) where {W,T<:Real32or64}
    V, name = Vec{W,T}, "llvm.copysign.v$W$(_suffix(T))"
    :($(Expr(:meta, :inline)); ccall($name, llvmcall, $V, ($V, $V), a, b))
end

"min(a, b), and `a` where it is NaN."
@generated function vmin(a::Vec{W,T}, b::Vec{W,T}) where {W,T<:Real32or64}
    v = _llvm(W, T)
    ir = "%3 = fcmp ogt $v %0, %1\n%4 = select <$W x i1> %3, $v %1, $v %0\nret $v %4"
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$T},Vec{$W,$T}}, a, b))
end

"max(a, b), and `a` where it is NaN."
@generated function vmax(a::Vec{W,T}, b::Vec{W,T}) where {W,T<:Real32or64}
    v = _llvm(W, T)
    ir = "%3 = fcmp olt $v %0, %1\n%4 = select <$W x i1> %3, $v %1, $v %0\nret $v %4"
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$T},Vec{$W,$T}}, a, b))
end

"Where `a > 0`, 1, else 0."
@generated function vpositive(a::Vec{W,T}) where {W,T<:Real32or64}
    v, t = _llvm(W, T), _llvm(T)
    one = "<" * join(("$t 1.0" for _ in 1:W), ", ") * ">"
    ir = "%2 = fcmp ogt $v %0, zeroinitializer\n%3 = select <$W x i1> %2, $v $one, $v zeroinitializer\nret $v %3"
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$T}}, a))
end

"`a` where bit `B` of `bits` is set, else `b`."
@generated function vselectbit(bits::Vec{W,Int32}, ::Val{B}, a::Vec{W,T}, b::Vec{W,T}) where {W,T<:Real32or64,B}
    v, i = _llvm(W, T), _llvm(W, Int32)
    mask = "<" * join(("i32 $(reinterpret(Int32, UInt32(1) << B))" for _ in 1:W), ", ") * ">"
    ir = """
    %4 = and $i %0, $mask
    %5 = icmp ne $i %4, zeroinitializer
    %6 = select <$W x i1> %5, $v %1, $v %2
    ret $v %6"""
    V = Vec{W,T}
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, $V, Tuple{Vec{$W,Int32},$V,$V}, bits, a, b))
end

"`a` negated where the top bit of `bits` is set."
@generated function vflipsign(a::Vec{W,T}, bits::Vec{W,Int32}) where {W,T<:Real32or64}
    v, i = _llvm(W, T), _llvm(W, Int32)
    sign = "<" * join(("i32 $(typemin(Int32))" for _ in 1:W), ", ") * ">"
    w = _llvm(W, intof(T))
    amount = "<" * join(("i64 32" for _ in 1:W), ", ") * ">"
    shifted = T === Float32 ? "" : "%z = zext $i %k to $w\n%m = shl $w %z, $amount\n"
    ir = """
    %k = and $i %1, $sign
    $shifted%b = bitcast $v %0 to $w
    %x = xor $w %b, $(T === Float32 ? "%k" : "%m")
    %r = bitcast $w %x to $v
    ret $v %r"""
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$T},Vec{$W,Int32}}, a, bits))
end

"Bits of a float vector as signed integers of its width, and back."
@generated function vbits(a::Vec{W,T}) where {W,T<:Real32or64}
    I = intof(T)
    ir = "%2 = bitcast $(_llvm(W, T)) %0 to $(_llvm(W, I))\nret $(_llvm(W, I)) %2"
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$I}, Tuple{Vec{$W,$T}}, a))
end

@generated function vfrombits(::Type{T}, a::Vec{W,I}) where {W,T<:Real32or64,I<:Integer}
    ir = "%2 = bitcast $(_llvm(W, I)) %0 to $(_llvm(W, T))\nret $(_llvm(W, T)) %2"
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$I}}, a))
end

"Signed integers as floats."
@generated function vfloat(::Type{T}, a::Vec{W,I}) where {W,T<:Real32or64,I<:Integer}
    ir = "%2 = sitofp $(_llvm(W, I)) %0 to $(_llvm(W, T))\nret $(_llvm(W, T)) %2"
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,$T}, Tuple{Vec{$W,$I}}, a))
end

"Low halves of 64-bit lanes."
@generated function vlow(a::Vec{W,UInt64}) where {W}
    ir = "%2 = trunc $(_llvm(W, Int64)) %0 to $(_llvm(W, Int32))\nret $(_llvm(W, Int32)) %2"
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,Int32}, Tuple{Vec{$W,UInt64}}, a))
end

"Products of the low halves of 64-bit lanes."
@generated function vmulwide(a::Vec{W,UInt64}, b::Vec{W,UInt64}) where {W}
    v = _llvm(W, UInt64)
    mask = "<" * join(("i64 4294967295" for _ in 1:W), ", ") * ">"
    ir = "%3 = and $v %0, $mask\n%4 = and $v %1, $mask\n%5 = mul $v %3, %4\nret $v %5"
    :($(Expr(:meta, :inline)); Base.llvmcall($ir, Vec{$W,UInt64}, Tuple{Vec{$W,UInt64},Vec{$W,UInt64}}, a, b))
end
